"""Prompts computed once, their states forked for several answers, against each answer's prompt computed anew. In float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import auto_layer_profile
from src.data.packing import pack_pairs
from src.data.token_lists import TokenPair
from src.model import build_model
from src.preference.objective import Objective, pair_losses
from src.quantization.linear import quantize_linear
from tests.model.test_packed import MODELS, pack, same, tokens
from tests.random_checkpoint import make_dimensions, random_weights
from tests.states import cat, select
from tests.tiny import VERSIONS


@settings(max_examples=25)
@given(version=st.sampled_from(VERSIONS), roots=st.lists(st.integers(0, 20), min_size=1, max_size=3),
       forks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=4), with_state=st.booleans())
@torch.no_grad()
def test_a_fork_is_the_whole_sequence(version, roots, forks, with_state):
    model = MODELS[version]
    state = None
    if with_state:
        _, state = model(*pack([tokens(3, 90 + at) for at in range(len(roots))]))
    prompts = [tokens(length, at) for at, length in enumerate(roots)]
    parents = torch.tensor([parent % len(roots) for parent, _ in forks])
    answers = [tokens(length, 50 + at) for at, (_, length) in enumerate(forks)]
    hidden, end = model(*pack(prompts + answers), state, parents)

    alone = [model(prompt, state=state and select(state, torch.tensor([at]))) for at, prompt in enumerate(prompts)]
    for parent, answer in zip(parents.tolist(), answers, strict=True):
        whole, after = model(torch.cat((prompts[parent], answer)), state=state and select(state, torch.tensor([parent])))
        alone.append((whole[len(prompts[parent]):], after))
    torch.testing.assert_close(hidden, torch.cat([one for one, _ in alone]), rtol=0.0, atol=1e-10)
    same(end, cat([one for _, one in alone]))


def pairs() -> list[TokenPair]:
    """Three pairs of one prompt, one without a prompt, one of its own, and answers of a single token."""
    lengths = [(12, 5, 7), (12, 1, 9), (12, 30, 1), (0, 4, 1), (17, 8, 8)]
    drawn = [tuple(tokens(n, 10 * at + part).tolist() for part, n in enumerate(row)) for at, row in enumerate(lengths)]
    return [TokenPair(drawn[0][0] if len(prompt) == 12 else prompt, chosen, reject) for prompt, chosen, reject in drawn]


REFERENCES = [(-30.0, -40.0), (-6.0, -50.0), (-160.0, -6.0), (-20.0, -5.0), (-44.0, -45.0)]


def trained_model(version: str, quantization: str | None = None):
    """LoRA in block 0 and the head, block 1 and the embedding in full; away from the start, where LoRA has no gradient."""
    dimensions = make_dimensions(version, n_layer=2, n_embd=64, head_size=16, vocab_size=256)
    model = build_model(random_weights(dimensions), dimensions, torch.float64, quantize=quantization,
                        hold=lambda name, weight: quantize_linear(weight, "nf4") if name.startswith("blocks.0.") else None)
    settings = auto_layer_profile(2, 1e-3, 1e-4, rank=4, alpha=8.0)
    modes = {"emb": "full", "0": "lora", "1": "full", "head": "lora"}
    rank = {"rank": 4, "alpha": 8.0}
    apply_layer_profile(model, [replace(row, mode=modes[row.layer], **rank) for row in settings], seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            move = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data.double() + move
    return model


def losses_and_gradients(model, batches, references, grad_cp: bool, sft_on_prompt: bool = True):
    """Losses pair by pair, and the gradients of their mean."""
    objective = Objective({"beta": 0.3}, alpha=0.2, sft_on_prompt=sft_on_prompt)
    losses = torch.cat([pair_losses(model, batch, reference, objective, grad_cp)["loss"]
                        for batch, reference in zip(batches, references, strict=True)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return losses, torch.autograd.grad(losses.mean(), trained)


def assert_same(one, other) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-10)
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-10 * theirs.norm()


@pytest.mark.parametrize("sft_on_prompt", [False, True])
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("version", VERSIONS)
def test_shared_prompts_give_the_plain_losses_and_gradients(version, quantization, grad_cp, sft_on_prompt):
    model = trained_model(version, quantization)
    shared, plain = pack_pairs(pairs()), pack_pairs(pairs(), share_prompts=False)
    assert len(shared.tokens) < 0.7 * len(plain.tokens)
    found = losses_and_gradients(model, [shared], [REFERENCES], grad_cp, sft_on_prompt)
    assert_same(found, losses_and_gradients(model, [plain], [REFERENCES], False, sft_on_prompt))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batchs_loss_is_the_mean_over_its_pairs_alone(version):
    model = trained_model(version)
    together = losses_and_gradients(model, [pack_pairs(pairs())], [REFERENCES], False)
    each = [pack_pairs([pair]) for pair in pairs()]
    alone = losses_and_gradients(model, each, [[reference] for reference in REFERENCES], False)
    assert_same(together, alone)
