"""Random checkpoints: reproducible, in a trained model's ranges, and every tensor of them matters to the `rwkv` package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from src.checkpoint.dimensions import check_weights, read_dimensions
from src.checkpoint.io import fingerprint, save_checkpoint
from src.errors import UserError
from tests.random_checkpoint import RandomWeights, make_dimensions, random_weights

TINY = [make_dimensions("x060", 2, 32, 16, 50), make_dimensions("x070", 2, 32, 16, 50)]

# Scales one tensor of the loaded model at a time and prints which of them left the logits as they were.
TRY_EVERY_TENSOR = """
import json, sys, torch
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
held = model.z if hasattr(model, "z") else model.w
logits = lambda: model.forward([3, 1, 4, 1, 5], None, full_output=True)[0]
base, unmoved = logits(), []
for key in held:
    kept = held[key].clone()
    held[key].mul_(1.5).add_(0.1)  # in place, as the compiled v7 has a table of its own with the same tensors
    if (logits() - base).norm() < 1e-4 * base.norm():
        unmoved.append(key)
    held[key].copy_(kept)
print(json.dumps([unmoved, len(held), base.std().item(), (base[-1] - base[0]).std().item()]))
"""


@pytest.mark.parametrize("dimensions", [TINY[0], pytest.param(TINY[1], marks=pytest.mark.slow)], ids=["v6", "v7"])
def test_every_tensor_moves_the_package_s_logits(dimensions, tmp_path):
    weights = random_weights(dimensions)
    save_checkpoint(weights, tmp_path / "model.pth")
    v7 = "1" if dimensions.version == "x070" else "0"
    environment = {**os.environ, "RWKV_V7_ON": v7, "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    # The package's v7 adds ".pth" itself, its v6 where it is missing.
    done = subprocess.run([sys.executable, "-c", TRY_EVERY_TENSOR, str(tmp_path / "model")], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    unmoved, count, spread, change = json.loads(done.stdout.splitlines()[-1])
    # The package folds ln0 into the embedding when it loads (its v7 keeps the two), and adds block 0's empty v0, v1, v2.
    folded = {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    if dimensions.version == "x070":
        assert set(unmoved) == folded | {f"blocks.0.att.v{i}" for i in range(3)} and count == len(weights) + 3
    else:
        assert not unmoved and count == len(weights) - 2
    # Logits neither flat nor saturated, and not the same at every place.
    assert 0.3 < spread < 3 and 0.3 < change < 5


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_whole_checkpoint_of_its_dimensions(dimensions, dtype):
    weights = random_weights(dimensions, dtype=dtype)
    found = read_dimensions(weights, "random")
    check_weights(weights, found, "random")
    assert found.dtype == dtype and all(tensor.dtype == dtype for tensor in weights.values())
    assert (found.version, found.n_layer, found.n_ffn, found.ranks) == \
        (dimensions.version, dimensions.n_layer, dimensions.n_ffn, dimensions.ranks)


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_the_seed_decides(dimensions):
    assert fingerprint(random_weights(dimensions, 1)) == fingerprint(random_weights(dimensions, 1))
    assert fingerprint(random_weights(dimensions, 1)) != fingerprint(random_weights(dimensions, 2))


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_no_value_is_zero_and_no_tensor_constant(dimensions):
    for key, tensor in random_weights(dimensions).items():
        assert tensor.isfinite().all() and (tensor != 0).all() and tensor.std() > 0.01, key


@pytest.mark.parametrize("dimensions", TINY, ids=["v6", "v7"])
def test_decays_and_mixes_span_a_trained_model_s_ranges(dimensions):
    weights = random_weights(dimensions)
    for key, tensor in weights.items():
        if key.endswith((".w0", ".time_decay")):
            assert tensor.min() == -6 and tensor.max() == 1, key
        elif ".x_" in key or (".time_maa_" in key and tensor.dim() == 3 and tensor.shape[0] == 1):
            assert 0 <= tensor.min() < 0.2 and 0.8 < tensor.max() <= 1, key


def test_one_block_has_no_value_residual():
    dimensions = make_dimensions("x070", 1, 32, 8, 50)
    weights = random_weights(dimensions)
    assert not any(".att.v0" in key for key in weights) and read_dimensions(weights, "random") == dimensions


@pytest.mark.parametrize("arguments, expected", [
    (("x052", 2, 32, 16, 50), "expected x060 or x070"), (("x070", 2, 40, 16, 50), "head size 16 does not divide n_embd 40"),
])
def test_sizes_that_make_no_model_are_refused(arguments, expected):
    with pytest.raises(UserError, match=expected):
        make_dimensions(*arguments)


@pytest.mark.parametrize("dimensions", TINY, ids=lambda dimensions: dimensions.version)
def test_weights_that_are_drawn_when_asked_for_are_alike(dimensions):
    """The same at every call, each tensor from its own numbers, spread as those of `random_weights`."""
    drawn, whole = RandomWeights(dimensions, seed=3), random_weights(dimensions, seed=3)
    check_weights(drawn, dimensions, "drawn")
    assert list(drawn) == list(whole) and len({tuple(tensor.flatten()[:9].tolist()) for tensor in drawn.values()}) == len(whole)
    for name, tensor in whole.items():
        assert drawn[name].equal(drawn[name])
        # Both are samples of one distribution, of 32 numbers at the least: six standard errors apart are no accident.
        mean, spread, error = tensor.mean().item(), tensor.std().item(), tensor.numel() ** -0.5
        assert drawn[name].mean().item() == pytest.approx(mean, abs=6 * spread * error)
        assert drawn[name].std().item() == pytest.approx(spread, rel=6 * error)
