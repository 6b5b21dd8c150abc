"""Quantized products on a GPU against float64, by whichever way serves the number of rows; and PiSSA's split on both devices."""

import pytest
import torch

from src import kernels
from src.adapters.pissa import principal_part
from src.quantization import int8, nf4
from src.quantization.bitsandbytes import load_bitsandbytes
from src.quantization.linear import quantize_linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [1, 2, 7, 8, 16, 64]


def layer_and_input(mode: str, shape: tuple[int, int], rows: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    layer = quantize_linear(torch.randn(*shape, generator=generator) / shape[1]**0.5, mode)
    return layer, torch.randn(rows, shape[1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(1, 64), (7, 80), (129, 100), (130, 2112), (2048, 512), (512, 4096)])
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_a_product_against_float64(mode, shape, rows, dtype):
    """float32: sums in another order. Else the weight and y are rounded to dtype, and NF4's values may be beforehand."""
    layer, x = layer_and_input(mode, shape, rows, dtype)
    weight = layer.dequantize(torch.float32).double()
    truth, sizes = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    y = layer.cuda()(x.cuda())
    assert y.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    bound = 1e-5 if dtype == torch.float32 else 4 * unit
    error = (y.double().cpu() - truth).abs()
    assert (error <= bound * sizes + 2 * unit * truth.abs() + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 21), (5, 16), (130, 2112), (2048, 512)])
def test_an_int8_weight_is_the_cpus_to_the_last_bit(shape, dtype):
    layer, _ = layer_and_input("int8", shape, 1, dtype)
    expected = layer.dequantize(dtype)
    assert torch.equal(layer.cuda().dequantize(dtype).cpu(), expected)
    assert torch.equal(layer.rows(0, shape[0], dtype).cpu(), expected)


def test_rows_choose_the_way():
    """int8: up to 16 rows of whole pieces by codes; NF4: whole blocks by bitsandbytes' operator, which chooses beyond 4 rows."""
    assert kernels.missing("cuda") is None
    load_bitsandbytes("nf4", "int8")
    for dtype in DTYPES:
        assert [int8.fused(torch.ones(n, 48, dtype=dtype, device="cuda")) for n in (0, 1, 16, 17)] == [False, True, True, False]
        assert not int8.fused(torch.ones(1, 40, dtype=dtype, device="cuda"))
        has = hasattr(torch.ops.bitsandbytes, "gemm_4bit")
        assert [nf4.fused(torch.ones(n, 128, dtype=dtype, device="cuda")) for n in (0, 1, 64)] == [False, has, has]
        assert not nf4.fused(torch.ones(1, 96, dtype=dtype, device="cuda"))
    assert not int8.fused(torch.ones(1, 48, dtype=torch.float64, device="cuda"))


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 512])
@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_a_product_in_a_graph_follows_its_input(mode, rows):
    layer, x = layer_and_input(mode, (256, 512), rows, torch.bfloat16)
    layer, x = layer.cuda(), x.cuda()
    for _ in range(2):
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.mul_(2)
    graph.replay()
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_the_gradient_is_the_weights(mode):
    layer, x = layer_and_input(mode, (256, 512), 2, torch.float32)
    layer, x = layer.cuda(), x.cuda().requires_grad_()
    y = layer(x)
    upstream = torch.ones_like(y)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(gradient, upstream @ layer.dequantize(torch.float32), atol=1e-4, rtol=1e-4)


def test_torch_accepts_the_operators():
    assert kernels.missing("cuda") is None
    codes, scales = int8.quantize(torch.randn(8, 64))
    codes, scales = codes.cuda(), scales.cuda()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rwkv_wkv.int8_product, (torch.ones(2, 64, device="cuda"), codes, scales), test_utils=checks)
    torch.library.opcheck(torch.ops.rwkv_wkv.int8_dequantize, (codes, scales, torch.bfloat16), test_utils=checks)


@pytest.mark.parametrize(("out", "width"), [(96, 160), (160, 96)])
def test_pissa_splits_a_weight_alike_on_both_devices(out, width):
    """Up to float32 rounding of the product: singular values fall like 1/i, so that the subspace is well told apart."""
    u, _, v = torch.linalg.svd(torch.randn(out, width, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    weight = u @ torch.diag(1 / torch.arange(1, 97.0)) @ v
    (a, b), (other_a, other_b) = principal_part(weight, 8), principal_part(weight.cuda(), 8)
    assert (other_b @ other_a).cpu().sub(b @ a).norm() < 1e-5 * (b @ a).norm()
    assert other_a.is_contiguous() and other_b.is_contiguous()
