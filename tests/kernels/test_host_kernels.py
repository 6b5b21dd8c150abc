"""The CUDA kernels' own source, run on the CPU, against the steps in float64: output, final state and every gradient."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import host_kernels
from tests.wkv.inputs import (
    LOWEST_LOG_W,
    NAN_OF_A_GPU,
    SHAPED_BY_TOKEN,
    VERSIONS,
    bounds,
    draw,
    errors,
    poison,
    run,
    with_gradients,
)

pytestmark = pytest.mark.skipif(host_kernels.COMPILER is None, reason="no g++ here to compile the kernels with")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LENGTHS = [0, 1, 15, 16, 0, 17, 63, 1, 64, 65]


def check(version: str, inputs: dict[str, torch.Tensor], lengths: list[int], dtype: torch.dtype = torch.float32,
          chunked: bool = False, blocks: int = 1) -> dict[str, torch.Tensor]:
    tokens = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {name: x.to(dtype).double() if name in tokens else x for name, x in inputs.items()}
    cu_seqlens = bounds(lengths)
    truth = with_gradients(version, inputs, cu_seqlens, "naive")
    leaves = {name: x.to(dtype if name in tokens else torch.float32).requires_grad_() for name, x in inputs.items()}
    outputs = dict(zip(("y", "final state"), host_kernels.run(version, chunked, leaves, cu_seqlens, blocks), strict=True))
    generator = torch.Generator().manual_seed(1)  # the projection of with_gradients
    weights = [torch.randn(x.shape, generator=generator) for x in outputs.values()]
    total = sum((x.float() * weight).sum() for x, weight in zip(outputs.values(), weights, strict=True))
    gradients = torch.autograd.grad(total, list(leaves.values()))
    outputs |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    found = {name: x.detach().double() for name, x in outputs.items()}
    assert not {name: error for name, error in errors(found, truth).items() if not error < TOLERANCE[dtype]}
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_size", [8, 20, 32, 64])
@pytest.mark.parametrize("version", VERSIONS)
def test_sequential(version, head_size, dtype):
    n_head = 2 if head_size < 64 else 1
    check(version, draw(version, LENGTHS, n_head, head_size), LENGTHS, dtype)


@pytest.mark.parametrize("version", VERSIONS)
def test_sequential_with_the_largest_heads(version):
    check(version, draw(version, [17, 1], 1, 128), [17, 1])


def check_step(version: str, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """y and the state, which lies between other numbers and moves on in place, against one step in float64."""
    tokens = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {name: x.to(dtype if name in tokens else torch.float32) for name, x in inputs.items()}
    exact = {name: x.double() for name, x in inputs.items()}
    expected = run(version, exact, bounds([1] * len(exact["r"])), "naive")
    around = torch.randn(len(exact["r"]) + 2, *inputs["state"].shape[1:])
    memory = around.clone()
    memory[1:-1] = inputs["state"]
    y = host_kernels.step(version, inputs, memory[1:-1])
    found = dict(zip(("y", "state"), (y.double(), memory[1:-1].double()), strict=True))
    wrong = errors(found, dict(zip(("y", "state"), expected, strict=True)))
    assert wrong["y"] < TOLERANCE[dtype] and wrong["state"] < TOLERANCE[torch.float32]
    assert memory[0].equal(around[0]) and memory[-1].equal(around[-1])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_size", [8, 10, 16, 20, 32, 64, 100, 128])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_in_place(version, head_size, dtype):
    check_step(version, draw(version, [1] * 3, 2, head_size), dtype)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_of_many_heads(version):
    """Enough warps for blocks of several, the last of them not full."""
    check_step(version, draw(version, [1] * 79, 7, 32), torch.float32)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_of_tensors_that_16_bytes_do_not_divide(version):
    inputs = draw(version, [1] * 2, 2, 32)
    for name, x in inputs.items():
        memory = torch.zeros(x.numel() + 1)
        inputs[name] = memory[1:].view(x.shape).copy_(x)
        assert inputs[name].data_ptr() % 16
    check_step(version, inputs, torch.float32)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("version", VERSIONS)
def test_chunked(version, head_size, dtype):
    check(version, draw(version, LENGTHS, 1, head_size), LENGTHS, dtype, chunked=True)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("version", VERSIONS)
def test_chunked_in_segments(version, dtype):
    """Enough idle blocks for two segments of the longest sequence; the others end before their second one."""
    lengths = [520, 0, 1, 270]
    check(version, draw(version, lengths, 1, 32), lengths, dtype, chunked=True, blocks=8)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("log_w", [-1e-6, -1e-3, LOWEST_LOG_W, -20.0, -60.0, -1e4])
@pytest.mark.parametrize("version", VERSIONS)
def test_extreme_decays(version, log_w, chunked):
    """v7's chunked form serves the range that RWKV-7 defines; all others bear any decay."""
    if version == "x070" and chunked and log_w < LOWEST_LOG_W:
        pytest.skip("below RWKV-7's own range")
    lengths = [40, 1, 16]
    inputs = draw(version, lengths, 1, 32)
    inputs["log_w"] = torch.full_like(inputs["log_w"], log_w)
    if log_w == -60.0:
        inputs["state"] = 1e4 * inputs["state"]  # else the gradient of log w is near float32's smallest
    check(version, inputs, lengths, chunked=chunked)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e3])
@pytest.mark.parametrize("version", VERSIONS)
def test_initial_states_zero_and_large(version, size, chunked):
    lengths = [33, 1, 16]
    inputs = draw(version, lengths, 1, 32)
    check(version, inputs | {"state": size * inputs["state"]}, lengths, chunked=chunked)


@settings(max_examples=25)
@given(version=st.sampled_from(VERSIONS), chunked=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)),
       seed=st.integers(0, 2**30),
       lengths=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 50), st.sampled_from([16, 32, 48])), max_size=5))
def test_any_packing(version, chunked, dtype, seed, lengths):
    check(version, draw(version, lengths, 1, 32, seed), lengths, dtype, chunked)


@pytest.mark.parametrize("blocks", [1, 8])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_repeats_are_equal_bit_for_bit(version, chunked, blocks):
    lengths = [520, 3]
    inputs = draw(version, lengths, 1, 32)
    first, second = (check(version, inputs, lengths, torch.float32, chunked, blocks) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def results(call, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of the sum of all of them, by name, in float64."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y, state = call(leaves)
    gradients = torch.autograd.grad(y.double().sum() + state.double().sum(), list(leaves.values()))
    found = {"y": y, "final state": state} | {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {name: x.detach().double() for name, x in found.items()}


NAMES = [(version, name) for version in VERSIONS
         for name in (*SHAPED_BY_TOKEN[version], *(("u",) if version == "x060" else ()), "state")]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("version", "name"), NAMES)
def test_a_nan_reaches_all_that_depends_on_it_and_no_other_sequence(version, name, chunked, dtype):
    lengths, n_head = [5, 40, 7], 2
    cu_seqlens, tokens = bounds(lengths), set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {key: x.to(dtype if key in tokens else torch.float32) for key, x in draw(version, lengths, n_head, 32).items()}
    at = {"u": (0, 3), "state": (1, 0, 3, 3)}.get(name, (25, 0, 3))
    spoilt = poison(inputs, name, at)
    found = results(lambda x: host_kernels.run(version, chunked, x, cu_seqlens), spoilt)
    truth, clean = (results(lambda x: run(version, x, cu_seqlens, "naive"), {key: x.double() for key, x in one.items()})
                    for one in (spoilt, inputs))
    assert truth["y"].isnan().any() and not [key for key, x in truth.items() if (x.isnan() & found[key].isfinite()).any()]
    for one in (found, clean):
        for key, x in one.items():
            rows = slice(None) if name == "u" else slice(1, 2) if "state" in key else slice(5, 45)
            (x if key == "gradient of u" else x[rows].transpose(0, 1))[0] = 0  # all that may depend on it
    assert not {key: error for key, error in errors(found, clean).items() if not error < TOLERANCE[dtype]}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("version", "name"), NAMES)
def test_a_nan_reaches_what_a_step_makes_of_it(version, name, dtype):
    tokens = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {key: x.to(dtype if key in tokens else torch.float32) for key, x in draw(version, [1] * 3, 2, 64).items()}
    at = {"u": (0, 3), "state": (1, 0, 3, 3)}.get(name, (1, 0, 3))
    spoilt = poison(inputs, name, at)
    expected = run(version, {key: x.double() for key, x in spoilt.items()}, bounds([1] * 3), "naive")
    state = spoilt["state"].clone()
    assert any(x.isnan().any() for x in expected)
    for found, x in zip((host_kernels.step(version, spoilt, state), state), expected, strict=True):
        assert found.isnan().equal(x.isnan())


def test_rounding_to_tf32():
    """To 11 bits of mantissa, ties away from zero, against float64; infinities and NaN stay."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-2**31, 2**31, (4000,), generator=generator).int()
    bits[:1000] = bits[:1000] & ~0x1fff | 0x1000  # ties
    bits[1000:1004] = torch.tensor([NAN_OF_A_GPU, -1, 0x7f800000, -0x800000]).int()
    x = bits.view(torch.float32).clone()
    host_kernels.library().run_round_tf32(ctypes.c_void_p(bits.data_ptr()), len(bits))
    rounded = bits.view(torch.float32)
    assert x.isnan().equal(rounded.isnan()) and rounded[1002:1004].equal(x[1002:1004])
    usual = x.isfinite() & (x.abs() > 2.0**-100) & (x.abs() < 2.0**100)
    x, rounded = x[usual].double(), rounded[usual].double()
    unit = 2.0 ** (x.abs().log2().floor() - 10)
    assert rounded.equal(x.sign() * (x.abs() / unit + 0.5).floor() * unit)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("blocks", [1, 16])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_thousands_of_tokens(version, chunked, blocks, dtype):
    check(version, draw(version, [4097], 1, 64), [4097], dtype, chunked, blocks)
