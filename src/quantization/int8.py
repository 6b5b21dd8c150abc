"""int8, one byte a weight: symmetric, one float32 scale for each output row.

On a GPU our own kernels (cuda/int8_product.cu) multiply a few rows directly by the codes, and for many rows dequantize the weight
in one pass. Elsewhere, and where they can't be built, plain PyTorch runs.
"""

import torch
from torch import Tensor

from src import kernels

# Up to this many rows the kernel reads codes directly, one byte each, 8 rows at a time; beyond, a bfloat16 weight costs 5 bytes.
FEW_ROWS = 16
PIECE = 16  # codes that the kernel reads at once


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
    """Undo `quantize`: the weight [out, in] in `dtype`; each float32 product is rounded to it once."""
    if _compiled(codes, dtype):
        return torch.ops.rwkv_wkv.int8_dequantize(codes, scales, dtype)
    # With `out`, PyTorch rounds in the same pass on a GPU.
    return torch.mul(codes, scales, out=torch.empty(shape, dtype=dtype, device=codes.device))


def product(x: Tensor, codes: Tensor, scales: Tensor, out_features: int) -> Tensor:
    """x W^T where it is `fused`: x [..., in], W [out, in] as codes and scales -> [..., out] in x's dtype."""
    return torch.ops.rwkv_wkv.int8_product(x.reshape(-1, x.shape[-1]), codes, scales).reshape(*x.shape[:-1], out_features)


def fused(x: Tensor) -> bool:
    """Whether the kernel multiplies x [..., in] directly by codes."""
    width = x.shape[-1]
    return 0 < x.numel() <= FEW_ROWS * width and width % PIECE == 0 and _compiled(x, x.dtype)


def _compiled(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels support such activations on x's device."""
    return (x.device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16)
            and kernels.missing("cuda") is None)
