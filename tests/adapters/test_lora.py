"""LoRA against the published formula, float64 numerical gradients and its own merged weight."""

import pytest
import torch

from src.adapters.linear import Linear
from src.adapters.lora import LoRALinear
from src.quantization.linear import quantize_linear


def plain(out: int = 7, width: int = 13, dtype: torch.dtype = torch.float32) -> Linear:
    layer = Linear(width, out, dtype=dtype)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return layer


def lora(base, rank: int = 3, alpha: float = 6.0, dropout: float = 0.0, trained: bool = True) -> LoRALinear:
    layer = LoRALinear(base, rank, alpha, dropout, torch.Generator().manual_seed(1))
    if trained:
        torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(2))
    return layer


def inputs(width: int = 13, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [None, "nf4", "int8"])
def test_at_the_start_the_output_is_exactly_the_bases(mode, dtype):
    base = plain(dtype=dtype) if mode is None else quantize_linear(plain().weight, mode)
    layer = lora(base, dropout=0.5, trained=False).train()
    y = layer(inputs(dtype=dtype))
    assert y.dtype == dtype and torch.equal(y, base(inputs(dtype=dtype)))


def test_names_and_dtypes():
    layer = lora(plain(dtype=torch.bfloat16))
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.state_dict().items()} == {
        "weight": ((7, 13), torch.bfloat16), "lora_A": ((3, 13), torch.float32), "lora_B": ((7, 3), torch.float32)}
    quantized = lora(quantize_linear(plain().weight, "int8"))
    assert set(dict(quantized.named_parameters())) == {"lora_A", "lora_B"}
    assert (quantized.in_features, quantized.out_features) == (layer.in_features, layer.out_features) == (13, 7)


def test_the_weight_is_the_bases_own():
    base = plain()
    assert lora(base).weight is base.weight


def test_a_is_drawn_from_the_generator_within_the_kaiming_bound():
    first, second = (LoRALinear(plain(64, 100), 16, 32.0, 0.0, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.lora_A, second.lora_A)
    # Uniform in +-b with b = gain * sqrt(3 / fan_in), gain = sqrt(2 / (1 + 5)): 1/sqrt(100).
    # 1600 draws come within 2 % of the ends.
    assert 0.098 < first.lora_A.abs().max() <= 0.1
    # The standard error of the mean of 1600 such draws is 0.0014; five of them.
    assert abs(first.lora_A.mean().item()) < 0.007


def test_the_global_random_state_is_untouched():
    before = torch.get_rng_state()
    lora(plain(), trained=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_forward_is_equation_3():
    layer, x = lora(plain()), inputs()
    weight, a, b = (p.detach().double() for p in (layer.weight, layer.lora_A, layer.lora_B))
    x64 = x.double()
    expected = torch.einsum("oi,bti->bto", weight, x64) + 6.0 / 3 * torch.einsum("or,ri,bti->bto", b, a, x64)
    # float32 sums of 13 terms of size about 10.
    torch.testing.assert_close(layer(x).double(), expected, atol=2e-5, rtol=1e-6)


def test_gradients_against_numerical_in_float64():
    layer, x = lora(plain()).double(), inputs(dtype=torch.float64).requires_grad_()

    def product(x, weight, a, b):
        return torch.func.functional_call(layer, {"weight": weight, "lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.weight, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_gradients_over_a_quantized_base(mode):
    layer, x = lora(quantize_linear(plain().weight, mode)).double(), inputs(dtype=torch.float64).requires_grad_()

    def product(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(product, (x, layer.lora_A, layer.lora_B))


def test_float32_masters_get_float32_gradients_from_bfloat16_activations():
    layer = lora(plain(dtype=torch.bfloat16))
    layer.weight.requires_grad_(False)
    layer(inputs(dtype=torch.bfloat16)).sum().backward()
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32 and layer.weight.grad is None


@pytest.mark.parametrize("alpha", [1.0, 6.0, 32.0])
def test_a_merged_weight_gives_the_adapters_output(alpha):
    layer, x = lora(plain(), alpha=alpha), inputs()
    merged = LoRALinear.merge(layer.weight, dict(layer.named_parameters()), alpha)
    # Sums of 13 terms in float32, in another order; outputs grow with alpha to about 100.
    torch.testing.assert_close(x @ merged.T, layer(x), atol=1e-4, rtol=1e-5)


def test_merging_rounds_once_to_the_weights_precision():
    layer = lora(plain(dtype=torch.bfloat16))
    before = layer.weight.detach().clone()
    merged = LoRALinear.merge(layer.weight, dict(layer.named_parameters()), 6.0)
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    assert merged.dtype == torch.bfloat16 and torch.equal(layer.weight, before)
    # Half a unit in the last of bf16's 8 places, and float32's rounding before it.
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_dropout_acts_in_training_alone_and_on_the_lora_alone():
    layer, x = lora(plain(), dropout=0.5), inputs()
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.lora_B.data.zero_()
    assert torch.equal(layer.train()(x), x @ layer.weight.T)


def test_linear_multiplies_in_the_activations_dtype():
    layer = plain()
    x = inputs(dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, x @ layer.weight.bfloat16().T)
    empty = Linear(3, 5, device="meta", dtype=torch.bfloat16).weight
    assert empty.shape == (5, 3) and empty.is_meta and empty.dtype == torch.bfloat16
