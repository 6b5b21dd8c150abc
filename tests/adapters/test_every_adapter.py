"""What holds for every adapter of linear layers: where it starts, what it trains, its gradients, and its merged weight."""

import pytest
import torch

from src.adapters.linear import Linear
from src.adapters.modes import ADAPTERS
from src.quantization.linear import QuantizedLinear
from tests.adapters.layers import ALPHA, OUT, RANK, WIDTH, adapted, inputs, plain, tensors_of, trained

SCHEMES = [None, "nf4", "int8"]
every = pytest.mark.parametrize("mode", ADAPTERS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_starts_as_its_base(mode, scheme, dtype):
    layer, base = adapted(mode, scheme, dtype, dropout=0.5)
    y, x = layer.train()(inputs(dtype=dtype)), inputs(dtype=dtype)
    assert y.dtype == dtype
    if scheme and layer.splits_base:
        # The model at the start is W, but for an error of the quantized residual: below that of W quantized.
        exact = inputs(dtype=dtype) @ plain(dtype=dtype).weight.T
        assert (y - exact).norm() < (base(x) - exact).norm()
    else:
        # One rounding of a sum of 13 products; 2 r more that cancel, of which PiSSA's are as large as W x.
        torch.testing.assert_close(y, base(x), atol=4e-6 if dtype == torch.float32 else 0.02, rtol=0)


@every
@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_shapes_and_dtypes(mode, scheme):
    layer, _ = adapted(mode, scheme, torch.float32 if scheme else torch.bfloat16)
    shapes = layer.shapes(OUT, WIDTH, RANK)
    added = {name: tensor for name, tensor in layer.state_dict().items() if name != "weight" and not name.startswith("base.")}
    assert {name: tuple(tensor.shape) for name, tensor in added.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in added.values())
    trains = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trains == set(trained(layer)) == shapes.keys() - set(layer.keeps)
    assert isinstance(layer.base, QuantizedLinear) if scheme else layer.weight.dtype == torch.bfloat16
    assert (layer.in_features, layer.out_features) == (WIDTH, OUT)


@every
def test_the_weight_is_the_bases_own(mode):
    layer, base = adapted(mode)
    assert layer.weight is base.weight


@every
def test_its_tensors_are_where_the_weight_is(mode):
    layer = ADAPTERS[mode](Linear(WIDTH, OUT, device="meta"), RANK, ALPHA, 0.0, torch.Generator())
    assert layer.device.type == "meta" and all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_gives_the_adapters_output(mode, dtype):
    layer, base = adapted(mode, dtype=dtype, moved=0.3)
    before, x = base.weight.clone(), inputs(dtype=dtype)
    merged = layer.merge(base.weight, tensors_of(layer), ALPHA)
    assert merged.dtype == dtype and torch.equal(base.weight, before)
    expected = layer(x)
    # Sums of 13 terms of size 1 to 10 in another order; in bfloat16 the merged weight is rounded besides.
    torch.testing.assert_close(x @ merged.T, expected, atol=2e-5 if dtype == torch.float32 else 0.3, rtol=1e-5)
    assert (base(x) - expected).norm() > 0.2 * expected.norm()


@every
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_over_a_quantized_base_the_merged_weight_differs_by_the_quantization_error_alone(mode, scheme):
    """Merged into what the quantized layer holds, not the checkpoint's weight, the outputs are equal."""
    layer, _ = adapted(mode, scheme, moved=0.3)
    held, tensors = layer.base.dequantize(torch.float32), tensors_of(layer)
    if layer.splits_base:
        held = held + tensors["start_B"] @ tensors["start_A"]
    torch.testing.assert_close(inputs() @ layer.merge(held, tensors, ALPHA).T, layer(inputs()), atol=2e-5, rtol=1e-5)


@every
def test_merging_rounds_once_to_the_weights_precision(mode):
    layer, base = adapted(mode, dtype=torch.bfloat16, moved=0.3)
    exact = layer.merge(base.weight.float(), tensors_of(layer), ALPHA)
    assert torch.equal(layer.merge(base.weight, tensors_of(layer), ALPHA), exact.bfloat16())


@every
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_against_numerical_in_float64(mode, scheme):
    layer, _ = adapted(mode, scheme, torch.float64 if scheme is None else torch.float32, moved=0.3)
    layer, x = layer.double(), inputs(dtype=torch.float64).requires_grad_()
    names = trained(layer)

    def product(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    if mode == "dora":
        # Its norm is a constant for the gradient (section 4.3), which numerical differences have to be told.
        norms = layer.norms(layer.base_forward(layer.lora_A).detach().T)
        layer.norms = lambda across: norms
    assert torch.autograd.gradcheck(product, (x, *(layer.get_parameter(name) for name in names)))


@every
@pytest.mark.parametrize("scheme", SCHEMES)
def test_float32_tensors_get_float32_gradients_from_bfloat16_activations(mode, scheme):
    layer, _ = adapted(mode, scheme, torch.bfloat16, moved=0.1)
    layer(inputs(dtype=torch.bfloat16)).square().sum().backward()
    assert all(layer.get_parameter(name).grad.dtype == torch.float32 and layer.get_parameter(name).grad.norm() > 0
               for name in trained(layer))
    assert scheme or layer.weight.grad is None


@every
def test_the_global_random_state_is_untouched(mode):
    before = torch.get_rng_state()
    adapted(mode, "int8"), adapted(mode)
    assert torch.equal(torch.get_rng_state(), before)


@every
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_a_product_with_rows_and_a_thin_pair_and_perhaps_a_factor(mode, scheme):
    """As the log-probabilities without logits take a head apart."""
    layer, _ = adapted(mode, scheme, moved=0.3)
    pair = inputs() @ layer.rows(0, OUT, torch.float32).T + layer.down(inputs()) @ layer.up.T
    factor = layer.factor(torch.float32)
    assert (factor is None) == (mode != "dora")
    torch.testing.assert_close(pair if factor is None else pair * factor, layer(inputs()), atol=2e-5, rtol=1e-5)
