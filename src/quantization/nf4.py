"""NF4, four bits a weight, through bitsandbytes, on CPU and GPU.

NormalFloat of Dettmers et al. 2023 (QLoRA, section 3): every block of 64 weights is divided by its largest magnitude, and each
quotient becomes the nearest of 16 fixed values, the quantiles of a normal distribution. A weight costs half a byte, plus a
sixteenth of a byte for its share of the block's float32 scale.
"""

import torch
from torch import Tensor

from src.quantization.bitsandbytes import load_bitsandbytes

BLOCK_SIZE = 64


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight of any shape; blocks run over its elements in row-major order, and the last may be short.

    Args:
        weight: of any float dtype; it is quantized from that precision.

    Returns:
        The codes, uint8 of ceil(numel / 2) elements, two weights a byte; and the scales, float32 [ceil(numel / 64)].

    Raises:
        UserError: bitsandbytes is missing or cannot be loaded.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        weight = weight.float()
    codes, state = load_bitsandbytes("nf4", "int8").functional.quantize_4bit(weight, blocksize=BLOCK_SIZE, quant_type="nf4")
    return codes.flatten(), state.absmax


def rows(codes: Tensor, scales: Tensor, first: int, last: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the weight's rows first .. last - 1; `first` must be a multiple of 64, so that a block starts there."""
    start, end = first * in_features, last * in_features
    return codes[start // 2:-(-end // 2)], scales[start // BLOCK_SIZE:-(-end // BLOCK_SIZE)]


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Undo `quantize`: the weight in `dtype`, of the given shape."""
    library = load_bitsandbytes("nf4", "int8").functional
    kernel_dtype = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    state = library.QuantState(absmax=scales, shape=torch.Size(shape), dtype=kernel_dtype, blocksize=BLOCK_SIZE, quant_type="nf4")
    # bitsandbytes takes codes of shape [1, n] for a transposed weight; a column of a tiny weight's codes has that shape too.
    return library.dequantize_4bit(codes[:, None], state).reshape(shape).to(dtype)


def product(x: Tensor, codes: Tensor, scales: Tensor, out_features: int) -> Tensor:
    """x W^T where it is `fused`: x [..., in], W [out, in] as codes and scales -> [..., out] in x's dtype."""
    return torch.ops.bitsandbytes.gemm_4bit(x, codes[:, None], (out_features, x.shape[-1]), scales, BLOCK_SIZE, "nf4")


def fused(x: Tensor) -> bool:
    """Whether bitsandbytes multiplies x [..., in] directly by codes, which it can since 0.50.

    Its operator reads codes once for up to 4 rows. Beyond that, up to 1536 rows, it decides by card, shape and dtype whether
    this is faster than dequantizing. It reads no value on the host, so a CUDA graph can capture it.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    load_bitsandbytes("nf4", "int8")
    return x.numel() > 0 and x.shape[-1] % BLOCK_SIZE == 0 and hasattr(torch.ops.bitsandbytes, "gemm_4bit")
