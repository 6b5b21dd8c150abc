"""Logits against the published `rwkv` package's, on the same checkpoint files."""

import pytest
import torch

from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.model import build_model
from tests import plain_model
from tests.random_checkpoint import random_weights
from tests.rwkv_package import package_logits_of_many
from tests.tiny import FACTS, HEAD_SIZES, KINDS, VERSIONS, text_loss, tiny_dimensions, tiny_text

LENGTHS = (1, 2, 777)
TEXT = [0, *(byte for fact in FACTS for byte in tiny_text(*fact)[1:])]
NOISE = torch.randint(256, (max(LENGTHS),), generator=torch.Generator().manual_seed(0)).tolist()
# Trained models read what they have learned, and noise that they have not; random ones noise.
SEQUENCES = {"random": [NOISE[:n] for n in LENGTHS], "trained": [TEXT[:n] for n in LENGTHS] + [NOISE[:100]]}


@pytest.fixture(scope="module", params=VERSIONS)
def package(request, tiny_checkpoints):
    """The version, and the package's logits of every sequence by (kind, head size); one process for all of a version."""
    cases = [(kind, head_size) for kind in KINDS for head_size in HEAD_SIZES]
    requests = [(tiny_checkpoints(request.param, *case), SEQUENCES[case[0]]) for case in cases]
    return request.param, dict(zip(cases, package_logits_of_many(requests, request.param), strict=True))


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_the_packages(package, kind, head_size, tiny_checkpoints):
    version, expected = package
    path = tiny_checkpoints(version, kind, head_size)
    weights = load_checkpoint(path)
    dimensions = read_dimensions(weights, str(path))
    assert (dimensions.version, dimensions.head_size) == (version, head_size)
    assert [len(tokens) for tokens in SEQUENCES[kind][:3]] == [1, 2, 777]
    model, exact = (build_model(weights, dimensions, dtype) for dtype in (torch.float32, torch.float64))
    for tokens, theirs in zip(SEQUENCES[kind], expected[kind, head_size], strict=True):
        ours = model.logits(model(torch.tensor(tokens))[0])
        assert ours.shape == theirs.shape == (len(tokens), 256) and ours.dtype == torch.float32
        # float32 rounding; 1e-6 is what is seen. After all tokens together, and after the last.
        assert relative(ours, theirs) < 1e-5 and relative(ours[-1], theirs[-1]) < 1e-5
        # In float64 no error is ours, and it is the package's float32 that this sees.
        assert relative(exact.logits(exact(torch.tensor(tokens))[0]), theirs.double()) < 1e-5
        # So it is of what other tests take for the truth.
        plain = plain_model.logits({name: tensor.double() for name, tensor in weights.items()}, tokens)
        assert relative(plain, theirs.double()) < 1e-5


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("version", VERSIONS)
@torch.no_grad()
def test_trained_models_are_trained(version, head_size, tiny_checkpoints):
    """About 6 nats a byte before, 0.2 after: values, norms and decays are those of a model that has learned."""
    dimensions = tiny_dimensions(version, head_size)
    before, after = (build_model(weights, dimensions) for weights in
                     (random_weights(dimensions), load_checkpoint(tiny_checkpoints(version, "trained", head_size))))
    turns = [tiny_text(*fact) for fact in FACTS]
    assert text_loss(before, turns) > 4 and text_loss(after, turns) < 0.5
