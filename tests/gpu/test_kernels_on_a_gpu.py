"""The CUDA kernels on a GPU, both forms, against the CPU's in float64; as torch operators; on another stream.

The CPU's kernels are within 1e-12 of the recurrence step by step (tests/wkv), and thousands of tokens take them no time.
"""

import pytest
import torch

from src import kernels
from src.wkv import native
from tests.wkv.inputs import SHAPED_BY_TOKEN, VERSIONS, bounds, draw, errors, poison, run, with_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
# float32: rounding over thousands of steps, the chunked form's products split in three. bfloat16: rounding of the outputs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LENGTHS = [0, 1, 15, 16, 0, 17, 63, 1, 64, 65]


@pytest.fixture(scope="module", autouse=True)
def built():
    assert kernels.missing("cuda") is None


def operator(version: str):
    return getattr(torch.ops.rwkv_wkv, "wkv6_forward" if version == "x060" else "wkv7_forward")


def check(version: str, inputs: dict[str, torch.Tensor], lengths: list[int], dtype: torch.dtype, chunked: bool) -> None:
    tokens = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {name: x.to(dtype).double() if name in tokens else x for name, x in inputs.items()}
    cu_seqlens = bounds(lengths)
    truth = with_gradients(version, inputs, cu_seqlens, "native")
    leaves = {name: x.to("cuda", dtype if name in tokens else torch.float32).requires_grad_() for name, x in inputs.items()}
    y, state, _ = operator(version)(*leaves.values(), cu_seqlens, cu_seqlens.cuda(), native.INTERVAL, chunked, True)
    generator = torch.Generator().manual_seed(1)  # the projection of with_gradients
    weights = [torch.randn(x.shape, generator=generator).cuda() for x in (y, state)]
    total = (y.float() * weights[0]).sum() + (state * weights[1]).sum()
    found = {"y": y, "final state": state}
    gradients = torch.autograd.grad(total, list(leaves.values()))
    found |= {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    found = {name: x.detach().double().cpu() for name, x in found.items()}
    assert not {name: error for name, error in errors(found, truth).items() if not error < TOLERANCE[dtype]}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("head_size", "chunked"), [(8, False), (20, False), (64, False), (128, False), (32, True), (64, True)])
@pytest.mark.parametrize("version", VERSIONS)
def test_packings(version, head_size, chunked, dtype):
    check(version, draw(version, LENGTHS, 2, head_size), LENGTHS, dtype, chunked)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("head_size", "n_sequences"), [(8, 9), (16, 9), (20, 9), (32, 9), (64, 9), (64, 300), (128, 9)])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_in_place(version, head_size, n_sequences, dtype):
    """Against one step in float64; the state lies between those of other sequences, which stay as they are."""
    tokens = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {name: x.to(dtype if name in tokens else torch.float32)
              for name, x in draw(version, [1] * n_sequences, 2, head_size).items()}
    exact = {name: x.double() for name, x in inputs.items()}
    expected_y, expected_state = run(version, exact, bounds([1] * n_sequences), "naive")
    around = torch.cat([inputs["state"][-1:], inputs["state"], inputs["state"][:1]]).cuda()
    before = around.clone()
    step = native.wkv6_step if version == "x060" else native.wkv7_step
    y = step(**{name: x.cuda() for name, x in inputs.items()} | {"state": around[1:-1]})
    assert errors({"y": y.double().cpu()}, {"y": expected_y})["y"] < TOLERANCE[dtype]
    assert errors({"state": around[1:-1].double().cpu()}, {"state": expected_state})["state"] < TOLERANCE[torch.float32]
    assert around[0].equal(before[0]) and around[-1].equal(before[-1])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_captures_a_step(version):
    inputs = {name: x.float().cuda() for name, x in draw(version, [1] * 5, 2, 64).items()}
    step, start = native.wkv6_step if version == "x060" else native.wkv7_step, inputs["state"].clone()
    y = step(**inputs | {"state": (expected := start.clone())})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(**inputs)
    inputs["state"].copy_(start)
    graph.replay()
    torch.cuda.synchronize()
    assert captured.equal(y) and inputs["state"].equal(expected)


@pytest.mark.parametrize("version", VERSIONS)
def test_tensors_that_16_bytes_do_not_divide(version):
    inputs = {name: x.float().cuda() for name, x in draw(version, [40, 3], 2, 32).items()}
    moved = {name: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for name, x in inputs.items()}
    for chunked in (False, True):
        results = []
        for leaves in (inputs, moved):
            leaves = [x.detach().requires_grad_() for x in leaves.values()]
            y, state, _ = operator(version)(*leaves, bounds([40, 3]), bounds([40, 3]).cuda(), native.INTERVAL, chunked, True)
            d_y, d_state = (torch.ones(x.numel() + 1, device="cuda")[1:].view(x.shape) for x in (y, state))
            results.append([y, state, *torch.autograd.grad((y, state), leaves, (d_y, d_state))])
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_long_sequences_in_segments(version, chunked, dtype):
    """Four heads leave nearly all of a GPU idle, so that the chunked form cuts the sequence."""
    lengths = [4097, 300]
    check(version, draw(version, lengths, 2, 64), lengths, dtype, chunked)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_not_a_number_comes_through(version, chunked, dtype):
    """The NaN that a GPU's own arithmetic makes, in each input of the second sequence: found in its outputs, and there alone."""
    lengths, tokens = [40, 40, 40], set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    clean = {name: x.to("cuda", dtype if name in tokens else torch.float32) for name, x in draw(version, lengths, 2, 64).items()}
    for poisoned in clean:
        inputs = poison(clean, poisoned, {"u": (0, 3), "state": (1, 0, 3, 3)}.get(poisoned, (60, 0, 3)))
        borders = bounds(lengths)
        y, state, _ = operator(version)(*inputs.values(), borders, borders.cuda(), native.INTERVAL, chunked, False)
        assert not y[40:80, 0].isfinite().all(), poisoned
        if poisoned != "u":
            assert y[:40].isfinite().all() and y[80:].isfinite().all() and state[[0, 2]].isfinite().all(), poisoned


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_torch_accepts_the_operators_and_repeats_are_equal(version, chunked):
    inputs = [x.float().cuda().requires_grad_() for x in draw(version, [40, 33], 2, 32).values()]
    arguments = (*inputs, bounds([40, 33]), bounds([40, 33]).cuda(), native.INTERVAL, chunked, True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(operator(version), arguments, test_utils=checks)
    first, second = (operator(version)(*arguments) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first[:2], second[:2], strict=True))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_current_stream_is_respected(version):
    inputs = [x.float().cuda() for x in draw(version, [500], 2, 64).values()]
    expected = operator(version)(*inputs, bounds([500]), bounds([500]).cuda(), native.INTERVAL, True, False)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # what is computed too early reads zeros
        late = [torch.zeros_like(x).copy_(x) for x in inputs]
        y = operator(version)(*late, bounds([500]), bounds([500]).cuda(), native.INTERVAL, True, False)[0]
    stream.synchronize()
    assert torch.equal(y, expected)
