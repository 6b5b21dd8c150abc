"""The layers' own gradients against numerical ones, and what recomputing a block computes again."""

import pytest
import torch

from src.model.layers import mix_tokens, relu_square
from src.quantization import nf4
from tests.model.test_packed import random_model, tokens


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("shape", [(4,), (5, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_mixes(shape, frozen):
    x, previous = draw(5, 4, seed=0), draw(5, 4, seed=1)
    mixes = [draw(*shape, seed=2 + n).requires_grad_(not frozen) for n in range(3)]
    for mixed, mix in zip(mix_tokens(x, previous, mixes), mixes, strict=True):
        torch.testing.assert_close(mixed, x * (1 - mix) + previous * mix)
    assert torch.autograd.gradcheck(lambda x, previous, *mixes: mix_tokens(x, previous, mixes), (x, previous, *mixes))


def test_relu_square():
    x = draw(6, 5, seed=0)
    torch.testing.assert_close(relu_square(x), x.clamp(min=0) ** 2)
    assert torch.autograd.gradcheck(relu_square, x)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_recomputing_a_block_dequantizes_only_what_widens(version, monkeypatch):
    model = random_model(version, 16, torch.float32, quantize="nf4")
    calls = []
    dequantize = nf4.dequantize
    monkeypatch.setattr(nf4, "dequantize", lambda *arguments: calls.append(arguments[2]) or dequantize(*arguments))
    # A gradient that reaches every product's input.
    model.blocks[0].ln1.weight.requires_grad_(True)
    n_products = {"x060": 8, "x070": 6}[version]
    found = {}
    for grad_cp in (False, True):
        calls.clear()
        model(tokens(9), grad_cp=grad_cp)[0].sum().backward()
        found[grad_cp] = list(calls)
    assert len(found[False]) == 2 * 2 * n_products
    extra = len(found[True]) - len(found[False])
    assert extra == 2 and sum(out > into for out, into in found[True]) == 2 * 3
