"""One linear layer for every kind of quantized weight; the weight is frozen, gradients only pass through.

A scheme is a module with `quantize(weight) -> (codes, scales)`, `dequantize(codes, scales, shape, dtype) -> weight`, and `rows`,
which selects the codes and scales of some rows of the weight. `fused(x)` says, by shape, device and dtype, whether
`product(x, codes, scales, out_features) -> y` multiplies directly by the codes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.errors import UserError
from src.quantization import int8, nf4

SCHEMES = {"nf4": nf4, "int8": int8}
# The suffix of a `--strategy`'s precision for each scheme, as in the rwkv package where it has one.
STRATEGY_SUFFIXES = {None: "", "nf4": "nf4", "int8": "i8"}


class QuantizedLinear(nn.Module):
    """Bias-free y = x W^T, W [out_features, in_features] stored quantized as the buffers `codes` and `scales`."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, in_features: int, out_features: int, mode: str):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] in `dtype`, recomputed at every call."""
        return SCHEMES[self.mode].dequantize(self.codes, self.scales, (self.out_features, self.in_features), dtype)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first .. last - 1 of the weight, [last - first, in_features], in `dtype`; `first` is a multiple of 64."""
        scheme = SCHEMES[self.mode]
        codes, scales = scheme.rows(self.codes, self.scales, first, last, self.in_features)
        return scheme.dequantize(codes, scales, (last - first, self.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        return quantized_product(x, self.codes, self.scales, self.out_features, self.mode)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, mode={self.mode}"

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # `module.bfloat16()`, called by training frameworks, would round the scales and so change the weight.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


@torch.library.custom_op("rwkv::quantized_product", mutates_args=())
def _quantized_product(x: Tensor, codes: Tensor, scales: Tensor, out_features: int, mode: str) -> Tensor:
    """x W^T. One operator for torch, so that no full-size copy of W stays alive, and checkpointing may keep the result."""
    scheme = SCHEMES[mode]
    if scheme.fused(x):
        return scheme.product(x, codes, scales, out_features)
    return F.linear(x, scheme.dequantize(codes, scales, (out_features, x.shape[-1]), x.dtype))


@_quantized_product.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, out_features: int, mode: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, codes, scales, _, ctx.mode = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(codes, scales)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    shape = (gradient.shape[-1], ctx.in_features)
    return gradient @ SCHEMES[ctx.mode].dequantize(codes, scales, shape, gradient.dtype), None, None, None, None


_quantized_product.register_autograd(_backward, setup_context=_keep)
quantized_product = torch.ops.rwkv.quantized_product.default


def quantize_linear(weight: Tensor, mode: str) -> QuantizedLinear:
    """Quantize `weight` [out, in] from its own precision, on its own device.

    Args:
        mode: "nf4" or "int8".

    Raises:
        UserError: another mode.
    """
    if mode not in SCHEMES:
        raise UserError(f"quantization mode {mode!r} is not supported; choose one of {', '.join(SCHEMES)}")
    with torch.no_grad():
        codes, scales = SCHEMES[mode].quantize(weight)
    return QuantizedLinear(codes, scales, in_features=weight.shape[1], out_features=weight.shape[0], mode=mode)
