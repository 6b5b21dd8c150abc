"""The host looks at no number of the device in a micro-batch. The meta device stands for a GPU: it has no numbers to look at."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import auto_layer_profile
from src.data.packing import Text, pack_texts
from src.model import build_model
from src.preference.entries import Pair
from src.preference.objective import Objective, pair_losses, text_losses
from src.training.batches import collate
from src.wkv import native
from tests.compiled import compiled
from tests.random_checkpoint import random_weights
from tests.tiny import VERSIONS, tiny_dimensions

PAIRS = [Pair([1, 2, 3], [4, 5], [6], -3.0, -4.0), Pair([1, 2, 3], [7], [8, 9, 1], -5.0, -6.0),
         Pair([], [2], [3, 4], -7.0, -8.0)]


class Literals(TorchFunctionMode):
    """Refuses tensors made on the device from the host's own numbers, for whose copy a GPU's host waits."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        assert not (made and result.device.type == "meta")
        return result


class Crossings(TorchDispatchMode):
    """The operators that carry tensors from the host to the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to_device = any(x.device.type == "meta" for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        # The recurrence takes the borders on both.
        if to_device and any(x.device.type == "cpu" for x in leaves) and "rwkv_wkv" not in str(function):
            self.found.append(str(function))
        return result


@pytest.fixture
def on_the_device(monkeypatch):
    """`on_the_device(version)`: a model there, with LoRA, whose recurrence runs in the kernels."""
    monkeypatch.setattr(native, "supports", lambda r: True)

    def make(version: str):
        dimensions = tiny_dimensions(version, 8)
        model = build_model(random_weights(dimensions), dimensions, quantize="int8")
        apply_layer_profile(model, auto_layer_profile(dimensions.n_layer, 1e-3, 1e-4, rank=4, alpha=8.0), seed=0)
        return model.to("meta").train()

    return make


@compiled
@pytest.mark.parametrize("grad_cp", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("version", VERSIONS)
def test_pairs(on_the_device, version, loss, grad_cp):
    model, (packed, references) = on_the_device(version), collate(PAIRS)
    packed, references = packed.to("meta"), references.to("meta")
    with Literals(), Crossings() as crossings:
        objective = Objective({"beta": 0.1}, alpha=0.1, sft_on_prompt=True, loss=loss)
        pair_losses(model, packed, references, objective, grad_cp)["loss"].sum().backward()
    # The packing's borders and indices, for all layers, forward and backward.
    assert crossings.found == ["aten._to_copy.default"] * 2


@compiled
@pytest.mark.parametrize("version", VERSIONS)
def test_texts(on_the_device, version):
    model, batch = on_the_device(version), pack_texts([Text([1, 2, 3], [True] * 3), Text([4, 5], [False, True])]).to("meta")
    with Literals(), Crossings() as crossings:
        text_losses(model, batch)["loss"].sum().backward()
    assert crossings.found == ["aten._to_copy.default"] * 2
