"""The C++ kernels against the steps in float64: lengths, packings, decays; as torch operators; when they can't be built."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src import kernels
from src.errors import UserError
from src.wkv import native
from tests.compiled import compiled
from tests.wkv.inputs import SHAPED_BY_TOKEN, VERSIONS, bounds, draw, errors, with_gradients

ROOT = Path(__file__).resolve().parents[2]
# float32: rounding over up to 4097 steps, 3e-7 as measured. bfloat16: that of the outputs alone, 2^-9 at most for each.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}
LENGTHS = [1, native.INTERVAL - 1, native.INTERVAL, native.INTERVAL + 1, 100]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def halved(version: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs whose bfloat16 tokens lose nothing when they are rounded."""
    rounded = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    return {name: x.bfloat16().double() if name in rounded else x for name, x in inputs.items()}


def check(version: str, inputs: dict[str, torch.Tensor], lengths: list[int], dtype: torch.dtype) -> None:
    cu_seqlens = bounds(lengths)
    if dtype == torch.bfloat16:
        inputs = halved(version, inputs)
    truth = with_gradients(version, inputs, cu_seqlens, "naive")
    compare(with_gradients(version, inputs, cu_seqlens, "native", dtype), truth, dtype)


def compare(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    wrong = {name: error for name, error in errors(found, truth).items() if not error < TOLERANCE[dtype]}
    assert not wrong


@compiled
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("version", VERSIONS)
def test_any_length(version, length, dtype):
    check(version, draw(version, [length], 2, 16), [length], dtype)


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_thousands_of_tokens(version):
    """With one truth for both precisions, since it takes most of the time."""
    cu_seqlens, inputs = bounds([4097]), halved(version, draw(version, [4097], 1, 16))
    truth = with_gradients(version, inputs, cu_seqlens, "naive")
    for dtype in (torch.float32, torch.bfloat16):
        compare(with_gradients(version, inputs, cu_seqlens, "native", dtype), truth, dtype)


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_threads_share_the_heads(version):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(version, draw(version, [40, 0, 1, 17], 3, 16), [40, 0, 1, 17], torch.float32)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("head_size", [8, 10, 16, 20, 32, 64, 100, 128])
@pytest.mark.parametrize("version", VERSIONS)
def test_any_head_size_packed(version, head_size, dtype):
    lengths = [40, 0, 1, 17, 0, 33]
    check(version, draw(version, lengths, 3, head_size), lengths, dtype)


@compiled
@settings(max_examples=40)
@given(version=st.sampled_from(VERSIONS), dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 2**30),
       head_size=st.integers(8, 40), n_head=st.integers(1, 3),
       lengths=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 70), st.sampled_from([16, 32, 48, 64])), max_size=7))
def test_any_packing(version, dtype, seed, head_size, n_head, lengths):
    check(version, draw(version, lengths, n_head, head_size, seed), lengths, dtype)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("log_w", [-1e-6, -1e-3, -1.0, -20.0, -80.0, -1e4, -math.inf])
@pytest.mark.parametrize("version", VERSIONS)
def test_extreme_decays(version, log_w, dtype):
    """From all kept to all forgotten: nothing is inverted, so both versions bear any decay."""
    lengths = [70, 33, 16]
    inputs = draw(version, lengths, 2, 16)
    truth_is_tiny = log_w == -80.0 and dtype == torch.float32  # e^-80 times products of inputs: near float32's smallest
    inputs["log_w"] = torch.full_like(inputs["log_w"], log_w)
    if truth_is_tiny:
        inputs["state"] = 100 * inputs["state"]
    check(version, inputs, lengths, dtype)


@compiled
@pytest.mark.parametrize("size", [0.0, 1e4])
@pytest.mark.parametrize("version", VERSIONS)
def test_initial_states_zero_and_large(version, size):
    lengths = [70, 1, 16]
    inputs = draw(version, lengths, 2, 16)
    check(version, inputs | {"state": size * inputs["state"]}, lengths, torch.float32)


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_leaks_between_sequences_and_repeats_are_equal_bit_for_bit(version):
    lengths = [20, 35, 20]
    inputs, cu_seqlens = draw(version, lengths, 2, 8), bounds(lengths)
    garbage = {name: x.clone() for name, x in inputs.items()}
    for name in ("r", "k", "v"):
        garbage[name][20:55] = math.nan
    garbage["state"][1] = math.nan
    clean, again, dirty = (with_gradients(version, x, cu_seqlens, "native", torch.float32) for x in (inputs, inputs, garbage))
    for name, x in clean.items():
        assert torch.equal(x, again[name]), name
        if name != "gradient of u":  # shared by all sequences
            kept = [0, 2] if "state" in name else [*range(20), *range(55, 75)]
            assert torch.equal(x[kept], dirty[name][kept]), name


def operator(version: str, lengths: list[int], head_size: int, dtype: torch.dtype):
    """The operator and its arguments, ready to be differentiated."""
    inputs = [x.to(dtype).requires_grad_() for x in draw(version, lengths, 2, head_size).values()]
    function = getattr(torch.ops.rwkv_wkv, "wkv6_forward" if version == "x060" else "wkv7_forward")
    return function, (*inputs, bounds(lengths), bounds(lengths), native.INTERVAL, False, True)


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_gradcheck(version):
    function, arguments = operator(version, [3, 0, 18], 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: function(*x)[:2], arguments)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("version", VERSIONS)
def test_torch_accepts_the_operators(version, dtype):
    # An empty sequence would leave a row of checkpoints that nobody writes or reads, and opcheck compares all.
    function, arguments = operator(version, [3, 18], 8, dtype)
    torch.library.opcheck(function, arguments)
    y, state, checkpoints = function(*arguments)
    backward = getattr(torch.ops.rwkv_wkv, "wkv6_backward" if version == "x060" else "wkv7_backward")
    plain = [x.detach() for x in arguments[:-6]]
    saved = (*plain, checkpoints.detach(), *arguments[-5:-3])
    torch.library.opcheck(backward, (*saved, y.detach(), state.detach(), native.INTERVAL, False))
    step = getattr(torch.ops.rwkv_wkv, "wkv6_step" if version == "x060" else "wkv7_step")
    torch.library.opcheck(step, tuple(x.detach() for x in operator(version, [1, 1], 8, dtype)[1][:-5]))


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_without_a_break(version):
    function = native.wkv6_native if version == "x060" else native.wkv7_native
    inputs, cu_seqlens = [x.float().requires_grad_() for x in draw(version, [5, 20], 2, 8).values()], bounds([5, 20])
    plain = function(*inputs, cu_seqlens)
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs, cu_seqlens)
    assert all(torch.equal(x, y) for x, y in zip(plain, traced, strict=True))
    expected, found = (torch.autograd.grad(y.sum() + state.sum(), inputs) for y, state in (plain, traced))
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_memory_grows_with_checkpoints_only(version):
    function, arguments = operator(version, [160, 7], 8, torch.float32)
    assert len(function(*arguments)[2]) <= 167 / native.INTERVAL + 2
    assert len(function(*arguments[:-1], False)[2]) == 0


@compiled
@pytest.mark.parametrize("wrong", ["shape", "cu_seqlens falls", "cu_seqlens ends early", "state", "dtype"])
def test_what_would_read_past_the_end_is_refused(wrong):
    function, (*inputs, cu_seqlens, again, interval, chunked, checkpoints) = operator("x070", [3, 5], 8, torch.float32)
    if wrong == "shape":
        inputs[2] = inputs[2][:-1].clone()
    elif wrong == "cu_seqlens falls":
        cu_seqlens = torch.tensor([0, 9, 8], dtype=torch.int32)
    elif wrong == "cu_seqlens ends early":
        cu_seqlens = bounds([3, 4])
    elif wrong == "state":
        inputs[-1] = inputs[-1][:1].clone()
    else:
        inputs[3] = inputs[3].double()
    with pytest.raises(RuntimeError, match="wkv"):
        function(*inputs, cu_seqlens, again, interval, chunked, checkpoints)


PROGRAM = """
import torch
from tests.wkv.inputs import VERSIONS, bounds, draw, errors, with_gradients
lengths = [40, 0, 1, 17]
for version in VERSIONS:
    for head_size in (16, 20, 64):
        inputs = draw(version, lengths, 2, head_size)
        truth = with_gradients(version, inputs, bounds(lengths), "naive")
        for dtype in (torch.float32, torch.float64):
            print(max(errors(with_gradients(version, inputs, bounds(lengths), "auto", dtype), truth).values()))
"""


def in_a_new_process(program: str = PROGRAM, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
                          check=True)


@pytest.mark.parametrize("instructions", kernels.INSTRUCTIONS[1:])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("version", VERSIONS)
def test_lesser_instructions(keep_to, instructions, version, dtype):
    keep_to(instructions)
    for head_size in (16, 20, 64):
        check(version, draw(version, [40, 0, 1, 17], 2, head_size), [40, 0, 1, 17], dtype)


def test_the_chosen_instructions_compute(keep_to):
    """Processors without AVX2's fused products and sums round twice."""
    found = []
    for name in ("avx2", "default"):
        keep_to(name)
        assert torch.ops.rwkv_wkv.instructions() == name
        inputs = {key: x.float() for key, x in draw("x070", [40], 2, 16).items()}
        found.append(native.wkv7_native(*inputs.values(), bounds([40]))[0])
    assert not found[0].equal(found[1])


@compiled
def test_instructions_that_are_not_there():
    with pytest.raises(UserError, match="instructions 'sse9' are unknown; choose one of avx512bf16, avx512, avx2, default"):
        kernels.use_instructions("sse9")
    for name in set(kernels.INSTRUCTIONS) - set(torch.ops.rwkv_wkv.available_instructions()):
        with pytest.raises(UserError, match=f"this processor has no '{name}' instructions; choose one of .*default"):
            kernels.use_instructions(name)


@compiled
def test_torchs_own_choice_of_instructions_rules_the_kernels():
    program = "import torch; from src import kernels; kernels.missing('cpu'); print(torch.ops.rwkv_wkv.instructions())"
    told = in_a_new_process(program, ATEN_CPU_CAPABILITY="default")
    assert told.stdout.split() == ["default"] and not told.stderr


def test_without_a_compiler_one_line_says_so_and_pytorch_serves(tmp_path):
    result = in_a_new_process(CXX="no-such-compiler", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert all(float(error) < TOLERANCE[torch.float32] for error in result.stdout.split())
    assert result.stderr.count("\n") == 1 and "no C++ compiler (no-such-compiler) was found; install g++" in result.stderr


@compiled
def test_a_compiler_that_fails_leaves_its_words_in_a_file_and_pytorch_serves(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -c "*) echo it is broken >&2; exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    result = in_a_new_process(CXX=str(compiler), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert all(float(error) < TOLERANCE[torch.float32] for error in result.stdout.split())
    building, failed = result.stderr.splitlines()
    assert building.startswith("Building the WKV kernels") and "could not be built, see" in failed
    log, = (tmp_path / "cache").rglob("build.log")
    assert str(log) in failed and "it is broken" in log.read_text()
