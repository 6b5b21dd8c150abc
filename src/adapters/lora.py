"""LoRA (Hu et al. 2021): a frozen weight W plus a trained product of two thin matrices.

y = W x + (alpha / r) B A dropout(x), with A [r, in] random and B [out, r] zero at the start, so that training begins at the base
model exactly. What trains: `lora_A` and `lora_B`. The frozen weight keeps its official name.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.linear import Linear
from src.quantization.linear import QuantizedLinear


class LoRALinear(nn.Module):
    """A `Linear` or `QuantizedLinear` with a LoRA beside it.

    Over a `Linear` the parameters are `weight` (the base's own), `lora_A` [rank, in] and `lora_B` [out, rank], so that the weight
    of `blocks.0.att.key` is still `blocks.0.att.key.weight`. A quantized base stays a submodule, `base`.
    `lora_A` and `lora_B` are float32 and take part in the product in the activations' dtype.

    Args:
        alpha: the LoRA's output is multiplied by alpha / rank.
        dropout: probability that an element of the LoRA's input is dropped, in training only.
        generator: a CPU generator; `lora_A` is drawn from it, uniformly within +-1/sqrt(in) (Kaiming with a = sqrt(5)).
    """

    def __init__(self, base: Linear | QuantizedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.alpha = alpha
        self.dropout = dropout
        if isinstance(base, QuantizedLinear):
            self.base = base
            device = base.codes.device
        else:
            self.weight = base.weight
            device = base.weight.device
        start = torch.empty(rank, self.in_features)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first .. last - 1 of the frozen weight, [last - first, in_features], in `dtype`."""
        return self.base.rows(first, last, dtype) if "base" in self._modules else self.weight[first:last].to(dtype)

    def thin(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> (alpha / rank) A dropout(x), [..., rank], in x's dtype."""
        scale = self.alpha / self.lora_A.shape[0]
        return F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)) * scale

    def base_forward(self, x: Tensor) -> Tensor:
        """The product with the frozen weight alone."""
        if "base" in self._modules:
            return self.base(x)
        return F.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        y, thin = self.base_forward(x).flatten(0, -2), self.thin(x).flatten(0, -2)
        return torch.addmm(y, thin, self.lora_B.to(x.dtype).T).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (f"in_features={self.in_features}, out_features={self.out_features}, rank={self.lora_A.shape[0]}, "
                f"alpha={self.alpha}, dropout={self.dropout}")


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, alpha: float) -> Tensor:
    """The one weight that acts as base and LoRA together: W + (alpha / r) B A (Hu et al. 2021, equation 3 and section 4.1).

    Args:
        weight: [out, in], lora_A: [r, in], lora_B: [out, r].

    Returns:
        A new tensor [out, in] in the weight's dtype, computed in float32.
    """
    product = lora_B.float() @ lora_A.float()
    return (weight.float() + alpha / lora_A.shape[0] * product).to(weight.dtype)
