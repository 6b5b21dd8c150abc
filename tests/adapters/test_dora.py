"""DoRA against its formula, and the gradient that the paper gives it."""

import torch

from src.adapters.dora import DoRALinear
from src.adapters.linear import Linear
from tests.adapters.layers import ALPHA, OUT, RANK, adapted, inputs

SCALE = ALPHA / RANK


def formula(layer: DoRALinear, weight: torch.Tensor, detached: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """W' = m V / ||V||, a norm for each output, applied to the inputs; and leaves (A, B, m), all in float64."""
    leaves = [layer.get_parameter(name).detach().double().requires_grad_() for name in ("lora_A", "lora_B", "lora_M")]
    v = weight.double() + SCALE * leaves[1] @ leaves[0]
    norm = torch.linalg.norm(v, dim=1, keepdim=True)
    return torch.einsum("oi,bti->bto", leaves[2][:, None] * v / (norm.detach() if detached else norm), inputs().double()), leaves


def test_forward_is_equation_5_with_a_magnitude_for_each_output():
    for scheme in (None, "nf4", "int8"):
        layer, base = adapted("dora", scheme, moved=0.5)
        weight = base.weight if scheme is None else base.dequantize(torch.float32)
        # float32 sums of 13 terms of size 10.
        torch.testing.assert_close(layer(inputs()).double(), formula(layer, weight, False)[0], atol=2e-5, rtol=1e-5)


def test_over_a_weight_in_float64_it_is_equation_5_to_float64s_precision():
    layer, base = adapted("dora", dtype=torch.float64, moved=0.5)
    layer = layer.double()
    y = layer(inputs(dtype=torch.float64))
    torch.testing.assert_close(y, formula(layer, base.weight, False)[0], rtol=1e-12, atol=1e-12)


def test_magnitudes_start_as_the_norms_of_the_weights_rows():
    layer, base = adapted("dora")
    torch.testing.assert_close(layer.lora_M, base.weight.norm(dim=1))
    layer, base = adapted("dora", "nf4")
    torch.testing.assert_close(layer.lora_M, base.dequantize(torch.float32).norm(dim=1))


def test_the_norm_is_a_constant_for_the_gradient():
    """Section 4.3: the gradient is autograd's with the norm detached, and another than with it."""
    layer, base = adapted("dora", moved=0.5)
    direction = torch.randn(2, 5, OUT, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad((layer(inputs()) * direction).sum(), [layer.lora_A, layer.lora_B, layer.lora_M])
    theirs, through = (torch.autograd.grad((y * direction).sum(), leaves)
                       for y, leaves in (formula(layer, base.weight, True), formula(layer, base.weight, False)))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert (ours[1] - through[1]).norm() > 0.1 * through[1].norm()


def test_a_row_of_zeros_stays_zero_and_its_gradients_finite():
    base = Linear(5, 2)
    base.weight.data = torch.zeros(2, 5)
    layer = DoRALinear(base, 2, 4.0, 0.0, torch.Generator().manual_seed(0))
    y = layer(torch.randn(3, 5))
    y.sum().backward()
    assert (y == 0).all() and all(layer.get_parameter(name).grad.isfinite().all() for name in ("lora_A", "lora_B", "lora_M"))


def test_rows_shorter_than_1e_12_count_as_zeros():
    base = Linear(13, 3)
    base.weight.data = torch.ones(3, 13) / 13**0.5 * torch.tensor([[0.0], [1e-15], [1e-13]])
    magnitudes = DoRALinear(base, RANK, ALPHA, 0.0, torch.Generator()).lora_M.detach()
    assert (magnitudes == magnitudes[0]).all() and magnitudes[0] <= 1.001e-12


def test_rows_of_any_size_are_scaled_by_their_own_norm():
    """Real weights have rows shorter than 1; what is smaller than 1e-12 alone counts as nothing."""
    sizes = torch.tensor([10.0, 0.5, 1e-2, 1e-5, 1e-9])
    base, generator = Linear(13, 5), torch.Generator().manual_seed(5)
    base.weight.data = torch.nn.functional.normalize(torch.randn(5, 13, generator=generator)) * sizes[:, None]
    layer = DoRALinear(base, RANK, ALPHA, 0.0, generator)
    torch.testing.assert_close(layer.lora_M.detach(), sizes)
    torch.testing.assert_close(layer(inputs()), inputs() @ base.weight.T, rtol=1e-4, atol=0)
    # Moved by about as much as each row is long; the magnitudes to three times what they were.
    layer.lora_B.data, layer.lora_M.data = torch.randn(5, RANK, generator=generator) * sizes[:, None], 3 * sizes
    v = base.weight.double() + SCALE * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    expected = 3 * sizes.double()[:, None] * v / v.norm(dim=1, keepdim=True)
    tensors = {name: layer.get_parameter(name).detach() for name in ("lora_A", "lora_B", "lora_M")}
    merged = DoRALinear.merge(base.weight.detach(), tensors, ALPHA)
    for row, size in enumerate(sizes.tolist()):
        torch.testing.assert_close(merged[row].double(), expected[row], rtol=1e-4, atol=1e-6 * size)
        # Float32 sums of 13 terms of that size.
        torch.testing.assert_close(layer(inputs())[..., row].double(), inputs().double() @ expected[row], rtol=1e-4,
                                   atol=1e-4 * size)


def test_dropout_is_the_loras():
    layer, _ = adapted("dora", moved=0.3, dropout=0.5)
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(inputs()), layer(inputs()))
    assert torch.equal(layer.eval()(inputs()), layer(inputs()))


def test_one_quantized_product_a_forward(monkeypatch):
    layer, _ = adapted("dora", "int8", moved=0.3)
    calls, forward = [], layer.base.forward
    monkeypatch.setattr(layer.base, "forward", lambda x: calls.append(len(x)) or forward(x))
    layer(inputs())
    assert calls == [10 + RANK]
