"""State tuning: the state before the first token, in training, in the file that runtimes read, and in the published package."""

import pytest
import torch

from src.adapters.apply import apply_layer_profile, parameter_groups
from src.adapters.files import load_adapter, save_adapter
from src.checkpoint.io import fingerprint, load_checkpoint, save_checkpoint
from src.generation.batch import prefill
from src.model import State, build_model
from src.model.decode import Forward
from tests.adapters.test_with_the_model import TOKENS, adapted, logits, profile, random_checkpoint
from tests.rwkv_package import package_logits, package_logits_from_state

VERSIONS = ["x060", "x070"]
STATES = profile("freeze", "state", "state", "freeze", state_lr_init=1.0, state_lr_final=0.1)


def tuned(version: str, dtype: torch.dtype = torch.float32, quantize: str | None = None):
    weights, dimensions = random_checkpoint(version)
    return adapted(weights, dimensions, STATES, dtype, quantize, step=0.5), weights, dimensions


@pytest.mark.parametrize("version", VERSIONS)
def test_the_states_are_all_that_trains_at_their_own_rates(version):
    model, weights, dimensions = tuned(version)
    (group,) = parameter_groups(model, STATES)
    assert group["names"] == [f"blocks.{layer}.att.time_state" for layer in range(2)]
    assert (group["lr_init"], group["lr_final"], group["weight_decay"]) == (1.0, 0.1, 0.0)
    assert model.blocks[0].att.time_state.shape == (4, 8, 8) and model.blocks[0].att.time_state.dtype == torch.float32
    untouched = build_model(weights, dimensions)
    apply_layer_profile(untouched, STATES, 0)
    assert torch.equal(logits(untouched), logits(build_model(weights, dimensions)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("grad_cp", [False, True])
def test_gradients_in_float64_are_those_of_finite_differences(version, grad_cp):
    model, _, _ = tuned(version, torch.float64)
    model = model.double()
    borders, parents = torch.tensor([0, 5, 9, 12, 14], dtype=torch.int32), torch.tensor([0, 1])
    direction = torch.randn(14, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value() -> torch.Tensor:
        return (model(TOKENS[:14], borders, parents=parents, grad_cp=grad_cp)[0] * direction).sum()

    states = [block.att.time_state for block in model.blocks]
    gradients = torch.autograd.grad(value(), states)
    for state, gradient in zip(states, gradients, strict=True):
        step = torch.randn(state.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                state += sign * 1e-5 * step
                ends.append(value())
                state -= sign * 1e-5 * step
        # The error of central differences, of order 1e-10 of the third derivative.
        torch.testing.assert_close((gradient * step).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_sequence_starts_from_it_and_one_that_goes_on_does_not(version):
    model, _, dimensions = tuned(version)
    whole = logits(model)  # sequences of 17 and 23 tokens
    assert torch.allclose(model.logits(model(TOKENS[:17])[0]), whole[:17], atol=1e-5)
    hidden, state = model(TOKENS[17:25])
    assert torch.allclose(model.logits(model(TOKENS[25:], state=state)[0]), whole[25:], atol=1e-5)
    hidden, _ = prefill(Forward(model), [TOKENS[:17].tolist(), TOKENS[17:].tolist()], budget=7)
    assert torch.allclose(model.logits(hidden), whole[[16, 39]], atol=1e-5)
    zeros = State.zeros(dimensions, 1, torch.float32)
    assert (model.logits(model(TOKENS[:17], state=zeros)[0]) - whole[:17]).norm() > 0.01 * whole[:17].norm()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_rwkv_package_reads_the_file(version, tmp_path):
    """v6 finds the states in the model's file, which it then transposes itself; v7 is handed them as the file has them."""
    model, weights, _ = tuned(version)
    save_adapter(model, tmp_path / "adapter.safetensors", STATES, fingerprint(weights), {})
    states = load_checkpoint(tmp_path / "adapter.state.pth")
    assert states.keys() == {f"blocks.{layer}.att.time_state" for layer in range(2)}
    assert all(tensor.shape == (4, 8, 8) and tensor.dtype == torch.float32 for tensor in states.values())
    tokens = TOKENS.tolist()
    if version == "x060":
        save_checkpoint(weights | states, tmp_path / "model.pth")
        found = package_logits(tmp_path / "model.pth", version, [tokens])[0]
    else:
        save_checkpoint(weights, tmp_path / "model.pth")
        found = package_logits_from_state(tmp_path / "model.pth", version, tmp_path / "adapter.state.pth", tokens)
    expected = model.logits(model(TOKENS)[0])
    assert (found - expected).norm() < 1e-5 * expected.norm()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.copy_(block.att.time_state.mT.clone())
    assert (model.logits(model(TOKENS)[0]) - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_an_adapter_file_brings_them_back(version, quantize, tmp_path):
    model, weights, dimensions = tuned(version, quantize=quantize)
    save_adapter(model, tmp_path / "adapter.safetensors", STATES, fingerprint(weights), {})
    again = adapted(weights, dimensions, STATES, quantize=quantize)
    assert not torch.equal(logits(again), logits(model))
    load_adapter(again, tmp_path / "adapter.safetensors", fingerprint(weights))
    assert torch.equal(logits(again), logits(model))
