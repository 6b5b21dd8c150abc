"""The CUDA kernels of int8 weights, their own source run on the CPU: products against float64, weights against PyTorch's."""

import ctypes

import pytest
import torch

from src.quantization import int8
from tests.kernels import host_kernels

pytestmark = pytest.mark.skipif(host_kernels.COMPILER is None, reason="no g++ here to compile the kernels with")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}
GUARD = 64  # elements behind every output that must stay as they are


class Int8Weight(ctypes.Structure):
    """As in cuda/int8_product.h."""

    _fields_ = [("codes", ctypes.c_void_p), ("scales", ctypes.c_void_p),
                *((name, ctypes.c_int) for name in ("out", "into", "dtype"))]


def quantized(out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a random weight with a row of zeros and one of large numbers."""
    weight = torch.randn(out, into, generator=torch.Generator().manual_seed(0))
    weight[out // 2] = 0
    weight[-1] *= 30
    return int8.quantize(weight)


def describe(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> Int8Weight:
    return Int8Weight(codes.data_ptr(), scales.data_ptr(), *codes.shape, DTYPES[dtype])


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy at a multiple of 16 bytes, as on a GPU."""
    memory = torch.empty(x.numel() + 16, dtype=x.dtype)
    start = -memory.data_ptr() % 16 // x.element_size()
    return memory[start:start + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16])
@pytest.mark.parametrize(("out", "into"), [(1, 16), (7, 48), (8, 512), (5, 2112)])
def test_product(out, into, rows, dtype):
    """Sums of `into` products in float32, at most 2^-24 of the sum of their sizes for each addition; then rounding to dtype."""
    codes, scales = quantized(out, into)
    x = torch.randn(rows, into, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = (x.double() @ codes.double().T) * scales.double().T
    sizes = (x.double().abs() @ codes.double().abs().T) * scales.double().T
    y = torch.full((rows * out + GUARD,), torch.nan, dtype=dtype)
    kept = aligned(x), aligned(codes)
    status = host_kernels.library().run_int8_product(ctypes.byref(describe(kept[1], scales, dtype)),
                                                     ctypes.c_void_p(kept[0].data_ptr()), rows, ctypes.c_void_p(y.data_ptr()))
    assert status == 0 and y[rows * out:].isnan().all()
    # A lane adds up its 16 codes of each piece of 2048, then come 5 shuffles, 4 warps and the scale.
    additions = 16 * -(-into // 2048) + 5 + 4 + 1
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = additions * 2**-24 * sizes + torch.finfo(dtype).eps / 2 * truth.abs() * (1 + 1e-3) + smallest
    assert ((y[:rows * out].view(rows, out).double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("out", "into"), [(1, 1), (3, 21), (4, 16), (5, 1160)])
def test_the_weight_is_pytorchs_to_the_last_bit(out, into, dtype):
    codes, scales = quantized(out, into)
    scales[0] = 1e-7  # float16's smallest numbers
    weight = torch.full((out * into + GUARD,), torch.nan, dtype=dtype)
    kept = aligned(codes)
    status = host_kernels.library().run_int8_dequantize(ctypes.byref(describe(kept, scales, dtype)),
                                                        ctypes.c_void_p(weight.data_ptr()))
    assert status == 0 and weight[out * into:].isnan().all()
    assert torch.equal(weight[:out * into].view(out, into), (codes * scales).to(dtype))
