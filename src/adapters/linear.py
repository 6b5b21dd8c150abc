"""The plain linear layer that models are built from, and that adapters wrap."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearLayer(Protocol):
    """What plain, quantized and adapted linear layers have in common."""

    in_features: int
    out_features: int
    __call__: Callable[..., Any]

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first .. last - 1 of the base's weight, without an adapter, [last - first, in_features], in `dtype`."""


# How a model applies a linear layer of any kind: (layer, x [T_total, in_features]) -> [T_total, out_features].
Product = Callable[[LinearLayer, Tensor], Tensor]


def apply(layer: LinearLayer, x: Tensor) -> Tensor:
    """The default Product."""
    return layer(x)


class Linear(nn.Module):
    """Bias-free y = x W^T with `weight` [out_features, in_features], whose dtype may differ from the activations'.

    A frozen base may be bfloat16, and a weight in training float32; the product is in the activations' dtype.
    The weight is created empty (on the meta device, if asked); the code that builds the model loads it.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        return F.linear(x, self.weight.to(x.dtype))

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first .. last - 1 of the weight, [last - first, in_features], in `dtype`."""
        return self.weight[first:last].to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
