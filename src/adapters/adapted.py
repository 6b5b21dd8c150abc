"""What the adapters of linear layers have in common: a frozen weight, and a few trained parameters added to it.

They compute y = W x + up down(x), with down(x) of r numbers and up [out, r]; DoRA also scales each output by a factor.
The frozen weight keeps its official name; the adapter's tensors are parameters of the same module.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.adapters.linear import Linear
from src.quantization.linear import QuantizedLinear


class AdaptedLinear(nn.Module):
    """A `Linear` or `QuantizedLinear` with an adapter; each adapter is a subclass in a file of its own, and a row of `ADAPTERS`.

    Over a `Linear` the base's own parameter is `weight`, so that the weight of `blocks.0.att.key` is still
    `blocks.0.att.key.weight`; a quantized base stays a submodule, `base`. The adapter's tensors are float32 and are cast to the
    activations' dtype for products.

    A subclass has `shapes`, `merge`, `down` and `up`, and if it scales its outputs also `factor` and its own `forward`.
    """

    # The columns that a row of a layer profile must have, besides the rates.
    needs: ClassVar[tuple[str, ...]] = ("Rank",)
    # Its tensors that do not train, but are needed to merge an adapter file.
    keeps: ClassVar[tuple[str, ...]] = ()
    # Whether it changes the values of a quantized base; `quantized` then makes both from the exact weight.
    splits_base: ClassVar[bool] = False

    def __init__(self, base: Linear | QuantizedLinear, rank: int, alpha: float, dropout: float, generator: torch.Generator):
        """rank, alpha and dropout are those of the layer's row; a subclass uses what it needs. generator: on the CPU."""
        self._hold(base)

    def _hold(self, base: Linear | QuantizedLinear) -> None:
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        if isinstance(base, QuantizedLinear):
            self.base = base
        else:
            self.weight = base.weight

    @classmethod
    def quantized(cls, weight: Tensor, scheme: str, rank: int) -> "AdaptedLinear":
        """The whole adapted layer, quantized from the exact `weight` [out, in]; nothing trains yet. Only for `splits_base`."""
        raise NotImplementedError

    @staticmethod
    def shapes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that the adapter adds, those in `keeps` last."""
        raise NotImplementedError

    @staticmethod
    def largest_rank(out_features: int, in_features: int) -> int:
        return min(out_features, in_features)

    @staticmethod
    def merge(weight: Tensor, tensors: dict[str, Tensor], alpha: float) -> Tensor:
        """The single weight equivalent to the base's `weight` [out, in] with the adapter's `tensors` (named as in `shapes`).

        Returns:
            A new tensor [out, in] in the weight's dtype, computed in float32.
        """
        raise NotImplementedError

    @property
    def quantized_base(self) -> bool:
        return "base" in self._modules

    @property
    def device(self) -> torch.device:
        return self.base.codes.device if self.quantized_base else self.weight.device

    @property
    def up(self) -> Tensor:
        """[out_features, r]"""
        raise NotImplementedError

    def down(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., r], in x's dtype."""
        raise NotImplementedError

    def factor(self, dtype: torch.dtype) -> Tensor | None:
        """[out_features], the factor on each output, from products in `dtype`; None if there is none."""
        return None

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first .. last - 1 of the frozen weight, [last - first, in_features], in `dtype`."""
        return self.base.rows(first, last, dtype) if self.quantized_base else self.weight[first:last].to(dtype)

    def base_forward(self, x: Tensor) -> Tensor:
        """The product with the frozen weight alone."""
        return self.base(x) if self.quantized_base else F.linear(x, self.weight.to(x.dtype))

    def forward(self, x: Tensor, base_product: Callable[["AdaptedLinear", Tensor], Tensor] = base_forward) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype; base_product(self, x) replaces `base_forward`."""
        y, down = base_product(self, x).flatten(0, -2), self.down(x).flatten(0, -2)
        return torch.addmm(y, down, self.up.to(x.dtype).T).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
