"""The CUDA kernels' own source, run on the CPU, against the steps in float64: output, final state and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wkv import host_kernels
from tests.wkv.inputs import LOWEST_LOG_W, SHAPED_BY_TOKEN, VERSIONS, bounds, draw, errors, with_gradients

pytestmark = pytest.mark.skipif(host_kernels.COMPILER is None, reason="no g++ here to compile the kernels with")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LENGTHS = [0, 1, 15, 16, 0, 17, 63, 1, 64, 65]


def check(version: str, inputs: dict[str, torch.Tensor], lengths: list[int], dtype: torch.dtype = torch.float32,
          chunked: bool = False, blocks: int = 1) -> dict[str, torch.Tensor]:
    tokens = set(SHAPED_BY_TOKEN[version]) - {"log_w"}
    inputs = {name: x.to(dtype).double() if name in tokens else x for name, x in inputs.items()}
    cu_seqlens = bounds(lengths)
    truth = with_gradients(version, inputs, cu_seqlens, "steps")
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
