"""Cached references against the published `rwkv` package's logits, and their independence of how pairs are batched."""

import math

import numpy as np
import pytest
import torch

from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import LayerSetting
from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.data.packing import packed_length
from src.data.token_lists import TokenPair
from src.errors import UserError
from src.model import build_model
from src.preference.kto import Mismatched
from src.preference.reference import joined, reference_log_probs, to_score
from tests.plain_model import log_probs
from tests.random_checkpoint import random_weights
from tests.rwkv_package import package_logits_of_many
from tests.stored_pairs import stored_tokens
from tests.tiny import HEAD_SIZES, KINDS, VERSIONS, tiny_dimensions


def turn(prompt: str, chosen: str, reject: str) -> TokenPair:
    answers = (list(f" {answer}\n\n".encode()) for answer in (chosen, reject))
    return TokenPair(list(f"User: {prompt}\n\nAssistant:".encode()), *answers)


# The trained models know the first answers by heart; then an unseen question, one token, no prompt, and noise.
PAIRS = [
    turn("What colour is the sky?", "It is blue.", "It is green."),
    turn("2 plus 3?", "5.", "What colour is grass? It is 9."),
    turn("What colour is a plum?", "It is as blue as the sky.", "Yes."),
    TokenPair([65], [66], [200]),
    TokenPair([], list(b"User: 3 plus 3?"), [7]),
    TokenPair(*(torch.randint(1, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 33, 50))),
]


def references(model, pairs=PAIRS, batch_tokens: int = 100) -> list[list[float]]:
    return reference_log_probs(model, stored_tokens(pairs), batch_tokens, lambda done: None, "the base").tolist()


def random_model(version: str, **more):
    dimensions = tiny_dimensions(version, 8)
    return build_model(random_weights(dimensions), dimensions, **more)


@pytest.fixture(scope="module", params=VERSIONS)
def package(request, tiny_checkpoints):
    """The version, and both answers' log-probabilities of all PAIRS by (kind, head size), from the package's logits."""
    cases = [(kind, head_size) for kind in KINDS for head_size in HEAD_SIZES]
    # End-of-text stands before an answer without a prompt.
    texts = [(prompt or [0], answer) for prompt, *answers in (pair[:3] for pair in PAIRS) for answer in answers]
    sequences = [prompt + answer for prompt, answer in texts]
    found = package_logits_of_many([(tiny_checkpoints(request.param, *case), sequences) for case in cases], request.param)
    sums = {}
    for case, logits in zip(cases, found, strict=True):
        log_probs = [torch.log_softmax(x.double(), -1) for x in logits]
        each = [sum(x[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))
                for x, (prompt, answer) in zip(log_probs, texts, strict=True)]
        sums[case] = list(zip(each[::2], each[1::2], strict=True))
    return request.param, sums


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_references_are_the_packages(package, kind, head_size, tiny_checkpoints):
    version, expected = package
    path = tiny_checkpoints(version, kind, head_size)
    weights = load_checkpoint(path)
    found = references(build_model(weights, read_dimensions(weights, str(path))))
    for pair, ours, theirs in zip(PAIRS, found, expected[kind, head_size], strict=True):
        for answer, mine, its in zip(pair[1:3], ours, theirs, strict=True):
            assert abs(mine - its) / len(answer) < 1e-4, (pair, mine, its)
    # 14 bytes that a trained model has read often, and that a random one gives some 6 nats each.
    assert found[0][0] > -8 if kind == "trained" else found[0][0] < -40


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("version", VERSIONS)
def test_what_else_is_in_the_batch_does_not_matter(version, dtype):
    model = random_model(version, dtype=dtype)
    together = references(model, batch_tokens=10**6)
    # Rounding alone, and of sums up to 300 nats: 5e-7 is seen in float32.
    near = pytest.approx([x for pair in together for x in pair], rel=0, abs=1e-4 if dtype == torch.float32 else 1e-10)
    for batch_tokens in (1, 64, 150):
        assert [x for pair in references(model, batch_tokens=batch_tokens) for x in pair] == near
    order = [3, 0, 5, 1, 4, 2]
    shuffled = references(model, [PAIRS[index] for index in order])
    assert [x for index in range(6) for x in shuffled[order.index(index)]] == near


@pytest.mark.parametrize("version", VERSIONS)
def test_equal_pairs_are_computed_once(version):
    model = random_model(version)
    pairs = [PAIRS[0], PAIRS[3], PAIRS[0], PAIRS[1], TokenPair(list(PAIRS[3][0]), [66], [200]),
             PAIRS[0]._replace(reject=PAIRS[1].reject), PAIRS[0]]
    passed, told = [], []
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    found = reference_log_probs(model, stored_tokens(pairs), 60, told.append, "the base").tolist()
    distinct = [pairs[0], pairs[1], pairs[3], pairs[5]]
    assert sum(passed) == sum(map(packed_length, distinct))
    # Told after each pass, of every pair that it answered.
    assert len(told) == len(passed) > 1 and sum(told) == len(pairs) and min(told) > 0
    assert found[0] == found[2] == found[6] != found[5] and found[1] == found[4]


def test_no_batch_is_larger_than_asked_but_for_a_long_pair():
    model, passed = random_model("x070"), []
    model.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    references(model, batch_tokens=100)
    long = [length for length in map(packed_length, PAIRS) if length > 100]
    assert len(passed) > len(long) > 0 and sorted(length for length in passed if length > 100) == sorted(long)


def test_dropout_has_no_part_in_them():
    model = random_model("x070")
    blocks = [LayerSetting(block, "lora", rank=4, alpha=8, dropout=0.5) for block in ("0", "1")]
    apply_layer_profile(model, [LayerSetting("emb", "freeze"), *blocks, LayerSetting("head", "freeze")], 0)
    for parameter in model.parameters():
        parameter.data.add_(0.05)  # an adapter that is nothing would drop nothing
    expected = references(model.eval())
    assert references(model.train()) == expected


def test_a_model_that_gives_no_numbers_is_refused():
    dimensions = tiny_dimensions("x070", 8)
    weights = random_weights(dimensions)
    weights["ln_out.weight"][0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        references(build_model(weights, dimensions))


def test_no_pairs():
    assert references(random_model("x070"), []) == []


THUMBS = [TokenPair(PAIRS[0].prompt, PAIRS[0].chosen, []), TokenPair(PAIRS[1].prompt, [], PAIRS[1].reject, 0, 2), PAIRS[2],
          TokenPair([65], [], [200]), TokenPair(PAIRS[1].prompt, [], PAIRS[1].reject)]  # the last has all of the second's
KL = [PAIRS[1].reject, PAIRS[0].chosen, [], [66], []]
KL_FROM = [3, 0, 0, 0, 0]


@pytest.mark.parametrize("version", VERSIONS)
def test_thumbs_and_their_mismatched_answers_have_the_references_of_a_plain_model(version):
    dimensions = tiny_dimensions(version, 8)
    weights = random_weights(dimensions)
    plain = {name: tensor.double() for name, tensor in weights.items()}
    told, model = [], build_model(weights, dimensions)
    pairs = stored_tokens(THUMBS)
    mismatched = Mismatched(np.array([pairs.lists.append(tokens) for tokens in KL]), np.array(KL_FROM))
    wanted = to_score(pairs, mismatched)
    found = joined(pairs, mismatched, reference_log_probs(model, wanted, 100, told.append, "the base"))
    assert sum(told) == len(THUMBS) + 3 == len(wanted)

    def log_prob(prompt, answer, start=0):
        return log_probs(plain, prompt + answer)[len(prompt) - 1 + start:].sum().item() if answer else 0.0

    for thumb, kl, kl_from, pair in zip(THUMBS, KL, KL_FROM, found, strict=True):
        assert (pair.prompt, pair.chosen, pair.reject, pair.chosen_from, pair.reject_from) == thumb
        assert (list(pair.kl), pair.kl_from) == (kl, kl_from)
        expected = (log_prob(thumb.prompt, thumb.chosen), log_prob(thumb.prompt, thumb.reject, thumb.reject_from),
                    log_prob(thumb.prompt, kl, kl_from))
        assert (pair.chosen_base_prob, pair.reject_base_prob, pair.kl_base_prob) == pytest.approx(expected, abs=1e-3)
    assert found[0].reject_base_prob == found[1].chosen_base_prob == found[2].kl_base_prob == 0.0
