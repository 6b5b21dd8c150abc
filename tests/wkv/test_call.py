"""The one call for both recurrences: its two layouts, its dtypes, its backends, and what it refuses."""

import pytest
import torch

from src.wkv import SHORT, chunked, native, reference, wkv6, wkv6_step, wkv7, wkv7_step
from tests.compiled import compiled
from tests.wkv.inputs import VERSIONS, bounds, draw, run

PER_HEAD = ("u", "state")


@pytest.mark.parametrize("length", [0, 1, 5, 37])
@pytest.mark.parametrize("backend", ["auto", pytest.param("native", marks=compiled), "chunked", "naive"])
@pytest.mark.parametrize("version", VERSIONS)
def test_batches_are_packed_sequences_of_one_length(version, backend, length):
    inputs = draw(version, [length] * 3, 2, 8)
    batched = {name: x if name in PER_HEAD else x.unflatten(0, (3, length)) for name, x in inputs.items()}
    y, state = run(version, inputs, bounds([length] * 3), backend)
    batched_y, batched_state = run(version, batched, None, backend)
    assert batched_y.shape == (3, length, 2, 8) and torch.equal(batched_y.flatten(0, 1), y)
    assert torch.equal(batched_state, state)
    if length == 0:
        assert torch.equal(state, inputs["state"])


@pytest.mark.parametrize("backend", ["auto", pytest.param("native", marks=compiled), "chunked", "naive"])
@pytest.mark.parametrize("version", VERSIONS)
def test_no_sequences_at_all(version, backend):
    y, state = run(version, draw(version, [], 2, 8), bounds([]), backend)
    assert y.shape == (0, 2, 8) and state.shape == (0, 2, 8, 8)


@pytest.mark.parametrize("backend", ["auto", pytest.param("native", marks=compiled), "chunked", "naive"])
@pytest.mark.parametrize("version", VERSIONS)
def test_no_state_is_a_state_of_zeros_and_a_given_one_is_not_changed(version, backend):
    lengths = [9, 0, 1]
    inputs = draw(version, lengths, 2, 8)
    before = inputs["state"].clone()
    assert not torch.equal(run(version, inputs, bounds(lengths), backend)[1], before)
    assert torch.equal(inputs["state"], before)
    started = (inputs | {"state": state} for state in (torch.zeros_like(before), None))
    zeros, none = (run(version, one, bounds(lengths), backend) for one in started)
    assert all(torch.equal(x, y) for x, y in zip(zeros, none, strict=True))


@pytest.mark.parametrize("native_serves", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_is_one_token_of_each_sequence_and_changes_the_state_in_place(version, dtype, native_serves, monkeypatch):
    inputs = {name: x.to(dtype) for name, x in draw(version, [1] * 5, 2, 8).items()}
    inputs["state"] = inputs["state"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected, expected_state = run(version, inputs, bounds([1] * 5), "naive")
    if not native_serves:
        monkeypatch.setattr(native, "supports", lambda r: False)
    state = inputs["state"].clone()
    y = {"x060": wkv6_step, "x070": wkv7_step}[version](**inputs | {"state": state})
    # A rounding of y's dtype where both sums are rounded to it, and a few of float32's before.
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state)
    assert y.dtype == dtype


@pytest.mark.parametrize("backend", ["auto", pytest.param("native", marks=compiled), "chunked", "naive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("version", VERSIONS)
def test_dtypes(version, dtype, backend):
    """y comes in r's dtype; the state in float32, or float64, which is also what half precision is computed in."""
    lengths = [40, 3]
    exact = draw(version, lengths, 2, 8)
    inputs = {name: x.to(dtype) for name, x in exact.items()}
    y, state = run(version, inputs, bounds(lengths), backend)
    assert y.dtype == dtype and state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rounded = {name: x.to(state.dtype) for name, x in inputs.items()}
    exact_y, exact_state = run(version, rounded, bounds(lengths), backend)
    assert torch.equal(y, exact_y.to(dtype)) and torch.equal(state, exact_state)


@pytest.mark.parametrize("served", [pytest.param(True, marks=compiled), False])
@pytest.mark.parametrize("version", VERSIONS)
def test_auto_takes_native_kernels_or_else_steps_for_short_sequences_and_chunks_for_long_ones(version, served, monkeypatch):
    taken = []
    for module, form in ((reference, "naive"), (chunked, "chunked"), (native, "native")):
        name = f"wkv{version[2]}_{form}"
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, form=form, original=original, **more: (
            taken.append(form) or original(*x, **more)))
    monkeypatch.setattr(native, "supports", lambda r: served)
    for lengths, expected in (([SHORT, 1], "naive"), ([SHORT + 1, 1], "chunked"), ([], "naive")):
        run(version, draw(version, lengths, 1, 4), bounds(lengths), "auto")
        assert taken.pop() == ("native" if served else expected) and not taken


@pytest.mark.parametrize("version", VERSIONS)
def test_heads_that_the_kernels_do_not_serve_go_to_pytorch_and_are_refused_by_name(version):
    inputs, borders = draw(version, [20], 1, 160), bounds([20])
    assert torch.equal(run(version, inputs, borders, "auto")[0], run(version, inputs, borders, "chunked")[0])
    with pytest.raises(ValueError, match="heads of 160 on cpu"):
        run(version, inputs, borders, "native")


@pytest.mark.parametrize(("version", "function"), [("x060", wkv6), ("x070", wkv7)])
def test_an_unknown_backend_is_refused(version, function):
    with pytest.raises(ValueError, match=r"'cuda2'.*native.*chunked.*naive"):
        function(**draw(version, [3], 1, 4), cu_seqlens=bounds([3]), backend="cuda2")
