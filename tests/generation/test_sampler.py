"""Penalties and sampling against the `rwkv` package's PIPELINE."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rwkv.utils import PIPELINE, PIPELINE_ARGS

from src import kernels
from src.generation.automaton import NEVER, STOPS, Automaton
from src.generation.config import Sampling
from src.generation.sampler import (
    BY_MAX_TOKENS,
    BY_STOP,
    GOES_ON,
    NOT_FINITE,
    KernelSampler,
    TorchSampler,
    count,
    draw,
    penalize,
    probabilities,
    sample,
)
from tests.generation.draws import SETTINGS, check_draws
from tests.generation.host_sampler import HostSampler
from tests.kernels.host_kernels import COMPILER

CPU = torch.device("cpu")
PIPELINE_WITHOUT_MODEL = PIPELINE.__new__(PIPELINE)


def package_probabilities(logits, monkeypatch, **settings) -> np.ndarray:
    """What the package hands to its random choice."""
    seen = []
    monkeypatch.setattr(np.random, "choice", lambda a, p: seen.append(p) or 0)
    PIPELINE_WITHOUT_MODEL.sample_logits(logits.clone(), **settings)
    return seen[0]


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0, "top_p": 0.3}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 2.5, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.999, "top_k": 7}, {"temperature": 1.3, "top_p": 0.2, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.97, "top_k": 10**6},
], ids=str)
@pytest.mark.parametrize(("vocab_size", "scale"), [(256, 2.0), (256, 0.1), (9000, 1.0), (9000, 6.0)])
def test_draws_from_the_packages_distribution(settings, vocab_size, scale, monkeypatch):
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(1)) * scale
    exact = logits.double().softmax(-1)
    ranked, order = exact.sort(descending=True)
    # A token stays while those before it have less than top_p. The package sums float32 softmaxes in float32, so both sums over V
    # terms and each term, e^-60 the least, are that much off at most.
    off = (ranked.cumsum(-1) - ranked - settings["top_p"]).abs() > 2 * (vocab_size + 60) * 2**-24
    off[:, settings.get("top_k", 0) or vocab_size:] = True
    decided = torch.empty_like(off).scatter_(-1, order, off).numpy()
    assert decided.mean() > 0.95
    ours = probabilities(logits, **settings).double().numpy()
    for row, sure, one in zip(ours, decided, logits, strict=True):
        expected = package_probabilities(one, monkeypatch, **settings).astype(float)
        kept = (row > 0) & (expected > 0)
        assert not (((row > 0) != (expected > 0)) & sure).any() and kept.any()
        # Both are float32 softmaxes, a few roundings apart.
        np.testing.assert_allclose(row[kept] / row[kept].sum(), expected[kept] / expected[kept].sum(), rtol=1e-5)


def test_top_p_1_keeps_every_token():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(probabilities(logits, 1.0, 1.0), logits.softmax(-1))


def test_ties_at_the_border_stay_together():
    assert probabilities(torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 1.0, 0.01)[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert probabilities(torch.zeros(1, 600), 1.0, 0.3, top_k=2)[0].tolist() == pytest.approx([1 / 600] * 600)


def test_a_very_low_temperature_takes_the_likeliest():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(3))
    assert sample(logits, torch.full((5,), 0.999), temperature=1e-4, top_p=0.9).equal(logits.argmax(-1))
    assert sample(logits, torch.full((5,), 0.999), temperature=0, top_p=0.9).equal(logits.argmax(-1))


def test_evenly_spread_uniforms_give_each_token_its_share():
    n = 20000
    probs = probabilities(torch.randn(1, 50, generator=torch.Generator().manual_seed(4)), 1.2, 0.9)
    drawn = draw(probs.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    # A token's share of [0, 1) is one interval, which holds n * p of the n points but for one at its ends.
    assert ((drawn.bincount(minlength=50) - n * probs[0].double()).abs() <= 1).all()


def test_the_ends_of_the_unit_interval_fall_on_possible_tokens():
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 1 / 3, 1 / 3, 1 / 3, 0.0]])
    for uniform, expected in ((0.0, [1, 1]), (np.nextafter(1, 0), [3, 3])):
        assert draw(probs, torch.full((2,), uniform, dtype=torch.float64)).tolist() == expected


@pytest.mark.parametrize("penalties", [(0.0, 1.0, 0.996), (0.7, 0.4, 0.9), (1.5, 0.0, 0.5)])
def test_penalties_follow_the_package(penalties):
    """The package generates from given logits; ours must choose the same tokens, among digits, spaces and letters."""
    presence, frequency, decay = penalties
    steps, vocab_size = 300, 128
    # Bytes 32 to 57 come first often, so that some are drawn again and again, counted and uncounted ones.
    logits = torch.randn(steps, vocab_size, generator=torch.Generator().manual_seed(6))
    logits[:, 32:58] += 3
    expected, left = [], iter(logits)

    pipeline = PIPELINE.__new__(PIPELINE)
    pipeline.model = SimpleNamespace(forward=lambda tokens, state: (next(left).clone(), None))
    pipeline.tokenizer = SimpleNamespace(encode=lambda text: [1], decode=lambda tokens: bytes(tokens).decode())
    pipeline.sample_logits = lambda out, **_: expected.append(int(out.argmax())) or expected[-1]
    pipeline.generate("", steps, PIPELINE_ARGS(alpha_presence=presence, alpha_frequency=frequency, alpha_decay=decay))

    weight = torch.tensor([float(bytes([byte]) not in b" \t0123456789") for byte in range(vocab_size)])
    occurrence, seen, ours = torch.zeros(1, vocab_size), torch.zeros(1, vocab_size, dtype=torch.bool), []
    for step in logits:
        tokens = penalize(step[None], occurrence, seen, presence, frequency).argmax(-1)
        count(occurrence, seen, tokens, weight, decay)
        ours.append(int(tokens))
    assert ours == expected
    assert {ord("0"), ord(" "), ord("!")} <= set(ours)


def skip_without(kernel: type) -> None:
    if kernel is HostSampler and COMPILER is None:
        pytest.skip("no g++ here to compile the kernel with")
    if kernel is KernelSampler and (reason := kernels.missing("cpu")):
        pytest.skip(reason)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("sampler", "scale"), [
    # The CUDA kernel as fibers takes as long as all the others.
    pytest.param(sampler, scale, marks=pytest.mark.slow if sampler is HostSampler and scale == 0.1 else ())
    for sampler in (KernelSampler, HostSampler, TorchSampler) for scale in (0.0, 0.1, 1.0, 8.0)])
def test_every_draw_is_right(sampler, settings, scale):
    skip_without(sampler)
    check_draws(sampler, settings, scale, vocab_size=3001 if scale == 1 else 601)


@pytest.mark.parametrize("kernel", [KernelSampler, HostSampler, TorchSampler])
def test_the_last_token_is_never_one_that_leaves_the_row_blank(kernel):
    skip_without(kernel)
    # Token 0 leaves it blank and is the likeliest, 1 does not.
    automaton = Automaton(torch.tensor([[0, 1, NEVER], [0, 1, STOPS]], dtype=torch.int16), 1)
    sampler = kernel(2, automaton, torch.ones(3), Sampling(temperature=0, frequency=0, max_tokens=3), CPU)
    sampler.enter(0, torch.zeros(2, 3, dtype=torch.float64))
    drawn = [sampler.draw(torch.tensor([[5.0, 1.0, 9.0], [5.0, 6.0, 9.0]])).tolist() for _ in range(4)]
    assert [tokens[0] for tokens, _ in drawn] == [0, 0, 1, 0] and [tokens[1] for tokens, _ in drawn] == [1, 2, 0, 0]
    assert [ended for _, ended in drawn] == [[GOES_ON, GOES_ON], [GOES_ON, BY_STOP], [BY_MAX_TOKENS, BY_STOP],
                                             [BY_MAX_TOKENS, BY_STOP]]


@pytest.mark.parametrize("kernel", [KernelSampler, HostSampler, TorchSampler])
def test_logits_that_are_not_finite_are_told_by_row(kernel):
    skip_without(kernel)
    logits = torch.zeros(5, 50)
    logits[1, 3], logits[2, 49], logits[4] = torch.nan, torch.inf, -torch.inf
    sampler = kernel(5, Automaton(torch.zeros(1, 50, dtype=torch.int16), 0), torch.ones(50), Sampling(), CPU)
    sampler.enter(0, torch.full((5, Sampling().max_tokens), 0.5, dtype=torch.float64))
    assert sampler.draw(logits)[1].tolist() == [GOES_ON, NOT_FINITE, NOT_FINITE, GOES_ON, NOT_FINITE]
