"""Bone, of the DiSHA family, now named MiSS (Kang, arXiv:2409.15371): shards of a weight share one trained matrix.

The input's columns are cut into shards of r, the last padded with zeros; the same D^T is added to every shard's weight:
y = W x + D^T sum_j x_j with D [r, out] zero at the start. What trains: `disha`, which is D, named and laid out as in RWKV-PEFT.
Merged: W plus D^T repeated along the input.

RWKV-PEFT calls this `bone` since the paper's second version; the block-affine form of the first, W + W_block b + b, is its `bat`
and not supported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import Linear
from src.quantization.linear import QuantizedLinear


class BoneLinear(AdaptedLinear):
    """A linear layer with `disha` [rank, out]. Alpha and dropout are not used, as in the paper."""

    def __init__(self, base: Linear | QuantizedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        super().__init__(base, rank, alpha, dropout, generator)
        self.disha = nn.Parameter(torch.zeros(rank, self.out_features, device=self.device))

    @staticmethod
    def shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"disha": (rank, out_features)}

    @staticmethod
    def largest_rank(out_features: int, in_features: int) -> int:
        return in_features

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], alpha: float) -> Tensor:
        disha, width = tensors["disha"].float(), weight.shape[1]
        repeated = disha.T.repeat(1, -(-width // len(disha)))[:, :width]
        return (weight.float() + repeated).to(weight.dtype)

    @property
    def up(self) -> Tensor:
        return self.disha.T

    def down(self, x: Tensor) -> Tensor:
        rank = len(self.disha)
        return F.pad(x, (0, -self.in_features % rank)).unflatten(-1, (-1, rank)).sum(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.disha)}"
