"""PiSSA's split against the exact SVD, and its way back into the base."""

import pytest
import torch

from src.adapters.pissa import PiSSALinear, principal_part
from src.quantization.linear import quantize_linear
from tests.adapters.layers import ALPHA, RANK, adapted, inputs, tensors_of


def decaying(out: int, width: int, seed: int = 0) -> torch.Tensor:
    """A weight whose singular values fall like 1/i."""
    u, s, v = torch.linalg.svd(torch.randn(out, width, generator=torch.Generator().manual_seed(seed)), full_matrices=False)
    return u @ torch.diag(1 / torch.arange(1, len(s) + 1.0)) @ v


@pytest.mark.parametrize(("out", "width", "rank"), [(40, 90, 8), (90, 40, 8), (64, 64, 64), (5, 7, 1), (3, 64, 3)])
def test_the_start_is_the_principal_part_as_equation_2_and_3_split_it(out, width, rank):
    weight = decaying(out, width)
    lora_A, lora_B = principal_part(weight, rank)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    assert lora_A.shape == (rank, width) and lora_B.shape == (out, rank)
    # The fast SVD's own error, with singular values that fall like 1/i.
    assert (lora_B @ lora_A - best).norm() < 1e-4 * best.norm()
    # Both factors carry the root of each singular value.
    for norms in (lora_A.norm(dim=1), lora_B.norm(dim=0)):
        torch.testing.assert_close(norms, s[:rank].sqrt(), rtol=1e-3, atol=0)


def noise(out: int, width: int) -> torch.Tensor:
    """Numbers from -0.5 to 0.5 without any order, by integer arithmetic alone: the same wherever it is run."""
    numbers = torch.arange(out * width).reshape(out, width) * 2654435761 % 2**32
    numbers = (numbers ^ numbers >> 15) * 1103515245 % 2**32
    return (numbers ^ numbers >> 13) % 10007 / 10007 - 0.5


@pytest.mark.parametrize(("out", "width", "distance"), [(200, 300, 0.1028), (300, 200, 0.1311), (300, 300, 0.1763)])
def test_the_split_stays_what_it_was(out, width, distance):
    """References and adapters over a quantized base come from its split, so every later one has to make the same.

    All singular values of noise are about as large, so that the distance from the exact split tells one from another: with
    another draw, size or number of rounds some of these differ by 10 % and more; rounding does not reach the digits here.
    """
    weight = noise(out, width)
    lora_A, lora_B = principal_part(weight, 4)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    best = u[:, :4] @ torch.diag(s[:4]) @ v[:4]
    assert (lora_B.double() @ lora_A.double() - best).norm() / best.norm() == pytest.approx(distance, rel=0.01)


def test_the_start_is_the_same_at_every_call():
    weight = decaying(20, 30)
    first = principal_part(weight, 4)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first, principal_part(weight, 4), strict=True))


@pytest.mark.parametrize(("out", "width"), [(20, 30), (30, 20)])
def test_the_draw_is_its_own_wherever_tensors_are_made(out, width):
    """Neither the global generator nor the default device has a say, nor is the generator moved on."""
    weight, before = decaying(out, width), torch.random.get_rng_state()
    first = principal_part(weight, 4)
    with torch.device("meta"):
        second = principal_part(weight, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("out", "width"), [(40, 90), (90, 40)])
def test_every_tensor_is_contiguous(out, width):
    """DeepSpeed's broadcast refuses others."""
    assert all(x.is_contiguous() for x in principal_part(decaying(out, width), 8))
    layer = PiSSALinear.quantized(decaying(out, width), "int8", 8)
    assert all(x.is_contiguous() for x in (*layer.parameters(), *layer.buffers()))


def test_the_output_is_the_residual_plus_what_trains():
    layer, base = adapted("pissa", moved=0.3)
    a, b, start_a, start_b = (tensors_of(layer)[name].double() for name in ("lora_A", "lora_B", "start_A", "start_B"))
    expected = inputs().double() @ (base.weight.double() - start_b @ start_a).T + inputs().double() @ (b @ a).T
    torch.testing.assert_close(layer(inputs()).double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantized_layer_holds_the_quantized_residual(scheme):
    weight = decaying(96, 64)
    layer = PiSSALinear.quantized(weight, scheme, 16)
    residual = weight - layer.start_B @ layer.start_A
    expected = quantize_linear(residual, scheme)
    assert torch.equal(layer.base.codes, expected.codes) and torch.equal(layer.base.scales, expected.scales)
    # QPiSSA's point: what is left is smaller, and so is its error.
    whole = weight - quantize_linear(weight, scheme).dequantize(torch.float32)
    assert (residual - layer.base.dequantize(torch.float32)).norm() < 0.7 * whole.norm()


def test_merged_at_the_start_it_is_the_base_itself():
    for scheme in (None, "nf4"):
        layer, _ = adapted("pissa", scheme)
        weight = adapted("pissa")[1].weight
        assert torch.equal(PiSSALinear.merge(weight, tensors_of(layer), ALPHA), weight)


def test_a_base_quantized_beforehand_is_refused():
    base = quantize_linear(decaying(8, 8), "int8")
    with pytest.raises(ValueError, match="quantized_linears"):
        PiSSALinear(base, RANK, ALPHA, 0.0, torch.Generator())
