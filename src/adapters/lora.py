"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen weight W plus a trained product of two thin matrices.

y = W x + (alpha / r) B A dropout(x), with A [r, in] random and B [out, r] zero at the start, so that training starts exactly from
the base model. What trains: `lora_A` and `lora_B`. Merged: W + (alpha / r) B A (equation 3 and section 4.1).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import Linear
from src.quantization.linear import QuantizedLinear


class LoRALinear(AdaptedLinear):
    """A linear layer with `lora_A` [rank, in] and `lora_B` [out, rank].

    Args:
        alpha: the LoRA's output is multiplied by alpha / rank.
        dropout: probability that an element of the LoRA's input is dropped, in training only.
        generator: a CPU generator; `lora_A` is drawn from it, uniformly within +-1/sqrt(in) (Kaiming with a = sqrt(5)).
    """

    needs = ("Rank", "Alpha")

    def __init__(self, base: Linear | QuantizedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__(base, rank, alpha, dropout, generator)
        self.alpha = alpha
        self.dropout = dropout
        start = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.device))

    @staticmethod
    def shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], alpha: float) -> Tensor:
        return changed_weight(weight, tensors, alpha).to(weight.dtype)

    @property
    def scale(self) -> float:
        return self.alpha / self.lora_A.shape[0]

    @property
    def up(self) -> Tensor:
        return self.lora_B

    def down(self, x: Tensor) -> Tensor:
        return F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)) * self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, alpha={self.alpha}, dropout={self.dropout}"


def changed_weight(weight: Tensor, tensors: dict[str, Tensor], alpha: float) -> Tensor:
    """W + (alpha / r) B A in float32: weight [out, in], lora_A [r, in] and lora_B [out, r] among `tensors`."""
    lora_A, lora_B = tensors["lora_A"].float(), tensors["lora_B"].float()
    return weight.float() + alpha / len(lora_A) * (lora_B @ lora_A)
