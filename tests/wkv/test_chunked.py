"""The chunked recurrences against the steps in float64: every length, packing and decay; output, final state, all gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.wkv.chunked import CHUNK_V6, CHUNK_V7
from tests.wkv.inputs import LOWEST_LOG_W, VERSIONS, bounds, draw, errors, with_gradients

# float64: rounding, and in v6 the bound on log w, below which a channel forgets all but e^-30 = 1e-13 of its state.
# float32: some 2e-7 as measured, 1e-6 for the gradient of v7's decay; the steps themselves in float32 are 2e-7 off.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


def check(version: str, inputs: dict[str, torch.Tensor], lengths: list[int], dtype: torch.dtype, skip: str = "") -> None:
    cu_seqlens = bounds(lengths)
    truth = with_gradients(version, inputs, cu_seqlens, "naive")
    found = with_gradients(version, inputs, cu_seqlens, "chunked", dtype)
    wrong = {name: error for name, error in errors(found, truth).items() if not error < TOLERANCE[dtype] and name != skip}
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("version", VERSIONS)
def test_any_length(version, length, dtype):
    assert {CHUNK_V6, CHUNK_V7} == {16, 32}  # the lengths are chosen around these
    check(version, draw(version, [length], 2, 16), [length], dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("head_size", [8, 16, 32, 64])
@pytest.mark.parametrize("version", VERSIONS)
def test_any_head_size_packed(version, head_size, dtype):
    lengths = [40, 0, 1, 17, 0, 70]
    check(version, draw(version, lengths, 3, head_size), lengths, dtype)


@settings(max_examples=40)
@given(version=st.sampled_from(VERSIONS), seed=st.integers(0, 2**30),
       lengths=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 70), st.sampled_from([16, 32, 48, 64])), max_size=7))
def test_any_packing(version, seed, lengths):
    check(version, draw(version, lengths, 2, 4, seed), lengths, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_w", [-1e-6, -1e-3, -1.0, -40.0, -1e4, -math.inf, "mixed", "strong, then weak"])
def test_v6_at_extreme_decays(log_w, dtype):
    """exp(-exp(d)) reaches from 1 to 0, and float32's log w = -exp(d) is -inf from d = 89 on."""
    lengths = [70, 33, 16]
    inputs = draw("x060", lengths, 2, 16)
    if log_w == "mixed":
        values = torch.tensor([-1e-6, -1e-2, -1.0, -10.0, -30.0, -100.0, -1e4, -math.inf], dtype=torch.float64)
        inputs["log_w"] = values[torch.randint(len(values), inputs["log_w"].shape, generator=torch.Generator().manual_seed(0))]
    elif log_w == "strong, then weak":
        # Cumulative sums beyond 400, whose differences are 0.01: float32 sums would leave errors of 1e-5 and more.
        by_token = torch.where(torch.arange(sum(lengths)) % 16 < 14, -29.7, -0.01).double()
        inputs["log_w"] = by_token[:, None, None].expand_as(inputs["log_w"])
    else:
        inputs["log_w"] = torch.full_like(inputs["log_w"], log_w)
    # At -40 everywhere the true gradient of log w is below 1e-17 and the chunked form's is 0.
    check("x060", inputs, lengths, dtype, skip="gradient of log_w" if log_w == -40.0 else "")


@pytest.mark.parametrize("log_w", [-5.0, -10.0, -20.0])
def test_v6_gradient_of_decays_that_are_all_strong(log_w):
    """Adam sees a gradient's sign whatever its size: what forgets to e^-20 in one step must still tell it."""
    lengths = [70, 33, 16]
    inputs = draw("x060", lengths, 2, 16)
    check("x060", inputs | {"log_w": torch.full_like(inputs["log_w"], log_w)}, lengths, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_w", [0.0, -1e-6, -0.1, LOWEST_LOG_W, "both ends"])
def test_v7_over_its_whole_range_of_decays(log_w, dtype):
    lengths = [70, 33, 32]
    inputs = draw("x070", lengths, 2, 16)
    if log_w == "both ends":
        inputs["log_w"] = torch.where(inputs["log_w"] < LOWEST_LOG_W / 2, LOWEST_LOG_W, 0.0).double()
    else:
        inputs["log_w"] = torch.full_like(inputs["log_w"], log_w)
    check("x070", inputs, lengths, dtype)


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_leaks_between_sequences(version):
    """Garbage in one sequence leaves the others' results bit for bit."""
    lengths = [20, 35, 20]
    inputs, cu_seqlens = draw(version, lengths, 2, 8), bounds(lengths)
    garbage = {name: x.clone() for name, x in inputs.items()}
    for name in ("r", "k", "v"):
        garbage[name][20:55] = math.nan
    garbage["state"][1] = math.nan
    clean, dirty = (with_gradients(version, x, cu_seqlens, "chunked") for x in (inputs, garbage))
    for name, x in clean.items():
        if name != "gradient of u":  # shared by all sequences
            kept = [0, 2] if "state" in name else [*range(20), *range(55, 75)]
            assert torch.equal(x[kept], dirty[name][kept]), name
