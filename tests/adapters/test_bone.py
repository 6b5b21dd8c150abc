"""Bone against its definition: every shard of the input meets the same matrix."""

import pytest
import torch

from src.adapters.bone import BoneLinear
from tests.adapters.layers import RANK, adapted, inputs, plain


@pytest.mark.parametrize("rank", [1, 3, 4, 13])
def test_forward_sums_the_shards(rank):
    """13 inputs: shards of 1 and 13 fit, those of 3 and 4 leave a last one to be filled up."""
    base = plain()
    layer = BoneLinear(base, rank, 0.0, 0.0, torch.Generator())
    layer.disha.data.normal_(generator=torch.Generator().manual_seed(1))
    x = inputs().double()
    expected = x @ base.weight.double().T
    for start in range(0, 13, rank):
        shard = x[..., start:start + rank]
        expected = expected + shard @ layer.disha[:shard.shape[-1]].double()
    torch.testing.assert_close(layer(inputs()).double(), expected, atol=2e-5, rtol=1e-5)
    merged = BoneLinear.merge(base.weight, {"disha": layer.disha.detach()}, 0.0)
    torch.testing.assert_close(inputs() @ merged.T, layer(inputs()), atol=2e-5, rtol=1e-5)


def test_its_parameters_are_rank_times_outputs():
    layer, _ = adapted("bone")
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad} == {"disha": (RANK, 7)}
    assert BoneLinear.largest_rank(7, 13) == 13
