"""The step-by-step recurrences: the published formulas written out again in NumPy, and gradients against numerical ones."""

import numpy as np
import pytest
import torch

from tests.wkv.inputs import VERSIONS, bounds, draw, run


def by_the_paper(version: str, x: dict[str, np.ndarray], start: int, end: int, sequence: int, head: int):
    """One head of one sequence: arXiv:2404.05892, eq. 16-19 (state [key, value]); arXiv:2503.14456, eq. 16-18 ([value, key])."""
    state, y = x["state"][sequence, head].copy(), []
    for t in range(start, end):
        r, k, v, w = (x[name][t, head] for name in ("r", "k", "v", "log_w"))
        if version == "x060":
            y.append(r @ (state + np.diag(x["u"][head]) @ np.outer(k, v)))
            state = np.diag(np.exp(w)) @ state + np.outer(k, v)
        else:
            kappa, a = x["kappa"][t, head], x["a"][t, head]
            state = state @ (np.diag(np.exp(w)) - np.outer(kappa, a * kappa)) + np.outer(v, k)
            y.append(state @ r)
    return np.array(y).reshape(end - start, len(state)), state


@pytest.mark.parametrize("head_size", [8, 64])
@pytest.mark.parametrize("version", VERSIONS)
def test_steps_are_the_published_formulas(version, head_size):
    lengths = [3, 0, 1, 20]
    inputs, cu_seqlens = draw(version, lengths, 2, head_size), bounds(lengths)
    y, state = run(version, inputs, cu_seqlens, "naive")
    plain = {name: x.numpy() for name, x in inputs.items()}
    for sequence, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        for head in range(2):
            expected_y, expected_state = by_the_paper(version, plain, start, end, sequence, head)
            # Both in float64; values reach some tens.
            np.testing.assert_allclose(y[start:end, head], expected_y, rtol=0, atol=1e-12)
            np.testing.assert_allclose(state[sequence, head], expected_state, rtol=0, atol=1e-12)


def differentiable(version: str, lengths: list[int], n_head: int, head_size: int, backend: str):
    inputs = draw(version, lengths, n_head, head_size)

    def function(*tensors):
        return run(version, dict(zip(inputs, tensors, strict=True)), bounds(lengths), backend)

    return function, tuple(x.requires_grad_() for x in inputs.values())


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_entry_of_the_jacobian_is_the_numerical_one(version, backend):
    """Each input's, the initial state's among them, with an empty and a one-token sequence between the others."""
    function, inputs = differentiable(version, [2, 0, 1, 3], 1, 3, backend)
    # The numerical derivative, by central differences of 1e-6 in float64, is good to some 1e-9.
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("head_size", [8, 16, 32, 64])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_across_chunks_are_the_numerical_ones(version, backend, head_size):
    """At the official head sizes and lengths over several chunks, by random projections of the Jacobian."""
    function, inputs = differentiable(version, [17, 0, 1, 35], 2, head_size, backend)
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)
