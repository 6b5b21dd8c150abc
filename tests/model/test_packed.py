"""One forward pass over packed sequences, with states carried, forked and kept, against each sequence alone in one piece."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.model import State, build_model
from tests.random_checkpoint import random_weights
from tests.states import cat, select
from tests.tiny import HEAD_SIZES, VERSIONS, text_loss, tiny_dimensions

# Float64 throughout, so that what is compared differs by rounding alone, however products are blocked.
EXACT = {"rtol": 0.0, "atol": 1e-10}
PARTS = ("att_shift", "wkv", "ffn_shift")


def random_model(version: str, head_size: int = 8, dtype: torch.dtype = torch.float64, **more):
    dimensions = tiny_dimensions(version, head_size)
    return build_model(random_weights(dimensions), dimensions, dtype, **more)


MODELS = {version: random_model(version) for version in VERSIONS}


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed))


def pack(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat(sequences), torch.tensor([0, *map(len, sequences)]).cumsum(0).int()


def same(found: State, expected: State, **tolerance) -> None:
    for part in PARTS:
        for ours, theirs in zip(getattr(found, part), getattr(expected, part), strict=True):
            torch.testing.assert_close(ours, theirs, **(tolerance or EXACT))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_packed_sequences_are_what_each_is_alone(version, head_size):
    model = random_model(version, head_size)
    sequences = [tokens(length, seed) for seed, length in enumerate([5, 0, 1, 40, 2, 33, 0])]
    hidden, state = model(*pack(sequences))
    alone = [model(sequence) for sequence in sequences]
    torch.testing.assert_close(hidden, torch.cat([one for one, _ in alone]), **EXACT)
    same(state, cat([one for _, one in alone]))


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_sequence_may_be_split_anywhere(version):
    model, sequence = MODELS[version], tokens(40)
    whole, end = model(sequence)
    for place in range(len(sequence) + 1):
        first, state = model(sequence[:place])
        second, state = model(sequence[place:], state=state)
        torch.testing.assert_close(torch.cat((first, second)), whole, **EXACT)
        same(state, end)


@settings(max_examples=25)
@given(version=st.sampled_from(VERSIONS),
       pieces=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=4))
@torch.no_grad()
def test_packed_sequences_may_be_split_anywhere(version, pieces):
    """Each sequence comes in three pieces of any lengths, none included; then all of them in one pass."""
    model = MODELS[version]
    sequences = [tokens(sum(lengths), seed).split(lengths) for seed, lengths in enumerate(pieces)]
    state, hidden = None, []
    for number in range(3):
        packed, bounds = pack([parts[number] for parts in sequences])
        out, state = model(packed, bounds, state)
        hidden.append(out.split(bounds.diff().tolist()))
    whole, end = model(*pack([torch.cat(parts) for parts in sequences]))
    torch.testing.assert_close(torch.cat([hidden[part][row] for row in range(len(pieces)) for part in range(3)]), whole, **EXACT)
    same(state, end)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_one_token_at_a_time_is_the_whole(version):
    model, sequence = MODELS[version], tokens(40)
    state, hidden = None, []
    for token in sequence.split(1):
        out, state = model(token, state=state)
        hidden.append(out)
    whole, end = model(sequence)
    torch.testing.assert_close(torch.cat(hidden), whole, **EXACT)
    same(state, end)


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_a_prompts_state_forks_for_its_answers(version):
    model = MODELS[version]
    prompts, answers = [tokens(12, 0), tokens(20, 1)], [tokens(7, 2), tokens(9, 3), tokens(1, 4)]
    _, state = model(*pack(prompts))
    kept = State(*([x.clone() for x in getattr(state, part)] for part in PARTS))
    hidden, end = model(*pack(answers), select(state, torch.tensor([1, 0, 1])))
    same(state, kept, rtol=0.0, atol=0.0)  # a state that is used, or forked, stays as it was
    alone = [model(torch.cat(both)) for both in zip((prompts[1], prompts[0], prompts[1]), answers, strict=True)]
    expected = torch.cat([whole[-len(answer):] for (whole, _), answer in zip(alone, answers, strict=True)])
    torch.testing.assert_close(hidden, expected, **EXACT)
    same(end, cat([one for _, one in alone]))


@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_sequences_without_tokens_keep_their_state(version):
    model = MODELS[version]
    _, before = model(*pack([tokens(5), tokens(6), tokens(7)]))
    _, after = model(*pack([tokens(0), tokens(3), tokens(0)]), before)
    same(select(after, torch.tensor([0, 2])), select(before, torch.tensor([0, 2])), rtol=0.0, atol=0.0)
    hidden, idle = model(*pack([tokens(0)] * 3), before)
    assert hidden.shape == (0, model.dimensions.n_embd) and model.logits(hidden).shape == (0, 256)
    same(idle, before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_recomputing_blocks_gives_the_same_gradients(version, dtype):
    model = random_model(version, dtype=dtype).requires_grad_(True)
    state = State(*([torch.randn_like(x).requires_grad_() for x in getattr(State.zeros(model.dimensions, 2, dtype), part)]
                    for part in PARTS))
    leaves = [*model.parameters(), *state.att_shift, *state.wkv, *state.ffn_shift]
    gradients = []
    for grad_cp in (False, True):
        hidden, end = model(*pack([tokens(20), tokens(3)]), state, grad_cp=grad_cp)
        loss = model.logits(hidden).square().mean() + sum(x.float().square().mean() for x in end.wkv)
        gradients.append(torch.autograd.grad(loss, leaves))
    for one, (plain, recomputed) in enumerate(zip(*gradients, strict=True)):
        assert plain.abs().max() > 0, one
        # The very same operations in the same order.
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_models_gradient_is_the_numerical_one(version):
    """Along a random direction in all weights, float64: central differences of 1e-5 are good to some 1e-8 relative."""
    model = random_model(version).requires_grad_(True)
    sequences = [tokens(30, 0).tolist(), tokens(9, 1).tolist()]
    generator = torch.Generator().manual_seed(0)
    parameters = list(model.parameters())
    direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) * x.detach().std() for x in parameters]
    gradient = torch.autograd.grad(text_loss(model, sequences), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    step, losses = 1e-5, []
    with torch.no_grad():
        for move in (step, -2 * step):
            for parameter, d in zip(parameters, direction, strict=True):
                parameter += move * d
            losses.append(text_loss(model, sequences))
    assert ((losses[0] - losses[1]) / (2 * step)).item() == pytest.approx(slope.item(), rel=1e-6)
