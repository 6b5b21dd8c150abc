"""Quantized weights against bitsandbytes' own layer, the published NF4 table and plain products."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from src.errors import UserError
from src.quantization.linear import quantize_linear

# Dettmers et al. 2023 (QLoRA), appendix E, to four places.
NF4 = torch.tensor([-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
                    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0])
SHAPES = [(1, 1), (1, 2), (3, 21), (5, 13), (7, 64), (37, 52), (64, 128), (129, 100)]


def random_weight(out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_the_nearest_of_the_published_values_times_the_block_maximum(shape, dtype):
    weight = random_weight(*shape, dtype)
    got = quantize_linear(weight, "nf4").dequantize(torch.float32)
    assert got.shape == shape
    flat = weight.float().flatten()
    for start in range(0, len(flat), 64):
        block = flat[start:start + 64]
        largest = block.abs().max()
        nearest = NF4[(block[:, None] / largest - NF4).abs().argmin(1)] * largest
        # The table has four places, so that a quotient within 1e-4 of the middle of two values may go either way; the distance to
        # the weight is then the same up to those 1e-4, plus 1e-4 for the value itself.
        error, best = (got.flatten()[start:start + 64] - block).abs(), (nearest - block).abs()
        assert (error <= best + 2e-4 * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes_own_layer(dtype):
    import bitsandbytes

    weight = random_weight(48, 128, dtype)
    theirs = bitsandbytes.nn.Linear4bit(128, 48, bias=False, quant_type="nf4", compress_statistics=False, compute_dtype=dtype)
    theirs.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", blocksize=64,
                                               compress_statistics=False)
    theirs = theirs.to("cpu")
    ours = quantize_linear(weight, "nf4")
    x = random_weight(10, 128, dtype, seed=1).requires_grad_()
    y, expected = ours(x), theirs(x)
    # The same dequantized weight; only the order of 128 additions may differ, and bf16 rounds the result to 8 bits.
    tolerance = 2e-5 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(y, expected, atol=tolerance, rtol=0)
    gradient = torch.autograd.grad(y.square().sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], atol=tolerance * 50, rtol=1e-2)


def test_nf4_takes_half_a_byte_a_weight_and_a_sixteenth_for_scales():
    layer = quantize_linear(random_weight(128, 256), "nf4")
    assert layer.codes.dtype == torch.uint8 and layer.codes.numel() == 128 * 256 // 2
    assert layer.scales.dtype == torch.float32 and layer.scales.numel() == 128 * 256 // 64
    assert not list(layer.parameters())


def test_int8_takes_a_byte_a_weight_and_a_scale_a_row():
    layer = quantize_linear(random_weight(128, 256), "int8")
    assert layer.codes.dtype == torch.int8 and layer.codes.numel() == 128 * 256
    assert layer.scales.dtype == torch.float32 and layer.scales.numel() == 128
    assert not list(layer.parameters())


@settings(max_examples=50)
@given(out=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 2**31), size=st.floats(1e-6, 1e6))
def test_int8_is_off_by_half_a_step_at_most(out, width, seed, size):
    weight = random_weight(out, width, seed=seed) * size
    largest = weight.abs().amax(1, keepdim=True)
    error = (quantize_linear(weight, "int8").dequantize(torch.float64) - weight.double()).abs()
    # Half a step, and float32 rounding of the quotient and the product (a few parts in 2^24 of at most 127 steps).
    assert (error <= largest.double() / 127 * (0.5 + 127 * 3 * 2**-24)).all()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_zeros_stay_zeros(mode):
    weight = random_weight(4, 64)
    weight[1] = 0
    restored = quantize_linear(weight, mode).dequantize(torch.float32)
    assert (restored[1] == 0).all() and torch.isfinite(restored).all()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_dequantized_weight(mode, shape, dtype):
    layer = quantize_linear(random_weight(*shape), mode)
    x = random_weight(2 * 3, shape[1], seed=1).reshape(2, 3, shape[1]).to(dtype).requires_grad_()
    upstream = random_weight(2 * 3, shape[0], seed=2).reshape(2, 3, shape[0]).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    got = torch.autograd.grad(y, x, upstream)[0]
    plain = x.detach().clone().requires_grad_()
    expected = F.linear(plain, layer.dequantize(dtype))
    # The same operations on the same numbers.
    assert torch.equal(y, expected)
    # The backward multiplies in another layout: additions of up to 129 terms in another order.
    eps = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(got, torch.autograd.grad(expected, plain, upstream)[0], atol=eps, rtol=1e-2 if eps == 0.2 else 0)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_gradient_against_numerical(mode):
    layer = quantize_linear(random_weight(5, 13), mode)
    assert torch.autograd.gradcheck(layer, random_weight(4, 13, torch.float64, seed=1).requires_grad_())


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_nothing_of_full_size_is_kept_for_the_backward(mode):
    layer = quantize_linear(random_weight(64, 128), mode)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(random_weight(2, 128, seed=1).requires_grad_())
    # The backward finds the layer's own buffers, and no copy.
    assert {x.data_ptr() for x in kept} == {layer.codes.data_ptr(), layer.scales.data_ptr()}


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_casting_the_module_leaves_the_weight_as_it_is(mode):
    layer = quantize_linear(random_weight(64, 128), mode)
    before = layer.dequantize(torch.float32)
    assert torch.equal(layer.bfloat16().dequantize(torch.float32), before)
    assert torch.equal(layer.half().double().dequantize(torch.float32), before)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_bfloat16_weights_are_quantized_from_bfloat16(mode):
    weight = random_weight(16, 64, torch.bfloat16)
    assert torch.equal(quantize_linear(weight, mode).codes, quantize_linear(weight.float(), mode).codes)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_transposed_view_is_quantized_as_what_it_shows(mode):
    weight = random_weight(20, 64)
    view = weight.t().contiguous().t()
    ours, plain = (quantize_linear(shown, mode).dequantize(torch.float32) for shown in (view, weight))
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("mode", ["fp8", "", "NF4 "])
def test_other_modes_are_refused_with_the_list(mode):
    with pytest.raises(UserError, match="nf4, int8"):
        quantize_linear(random_weight(2, 2), mode)


def test_state_dict_round_trip():
    layer, other = quantize_linear(random_weight(8, 64), "nf4"), quantize_linear(random_weight(8, 64, seed=1), "nf4")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dequantize(torch.float32), layer.dequantize(torch.float32))


def test_bitsandbytes_is_imported_only_for_nf4_and_quietly():
    program = """
import sys, torch
from src.quantization.linear import quantize_linear
quantize_linear(torch.ones(2, 2), "int8")
assert "bitsandbytes" not in sys.modules
quantize_linear(torch.ones(2, 2), "nf4")
assert "bitsandbytes" in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert "kernels" not in run.stdout + run.stderr


def test_the_logger_is_left_as_it_was():
    quantize_linear(random_weight(2, 2), "nf4")
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET


def test_a_missing_bitsandbytes_is_told(monkeypatch):
    from src.quantization.bitsandbytes import load_bitsandbytes

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    load_bitsandbytes.cache_clear()
    with pytest.raises(UserError, match="bitsandbytes.*int8"):
        quantize_linear(random_weight(2, 2), "nf4")
