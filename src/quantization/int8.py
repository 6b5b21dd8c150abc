"""int8, one byte a weight: symmetric, one float32 scale for each output row, plain PyTorch on every device."""

import torch
from torch import Tensor


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of `weight` [out, in] to 255 even steps between minus and plus its largest magnitude.

    Returns:
        The codes, int8 [out, in], and the scales, float32 [out, 1]: weight ~ codes * scales, at most half a scale off.
    """
    exact = weight.float()
    scales = exact.abs().amax(dim=1, keepdim=True) / 127
    # A row of zeros has scale 0; dividing it by 1 instead keeps its codes 0.
    codes = (exact / torch.where(scales > 0, scales, 1.0)).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def rows(codes: Tensor, scales: Tensor, first: int, last: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the weight's rows first .. last - 1."""
    return codes[first:last], scales[first:last]


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Undo `quantize`: the weight [out, in] in `dtype`."""
    return (codes * scales).reshape(shape).to(dtype)
