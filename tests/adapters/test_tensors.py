"""What a profile says by names and shapes alone is what the model then trains."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.adapters.apply import apply_layer_profile, quantized_linears
from src.adapters.files import adapter_tensors
from src.adapters.layer_profile import BLOCK_MODES, LayerSetting
from src.adapters.linear import Linear
from src.adapters.tensors import adapter_shapes, is_linear, shapes_of
from src.errors import UserError
from src.model import build_model
from tests.adapters.test_with_the_model import random_checkpoint
from tests.adapters.tiny import profile

VERSIONS = ["x060", "x070"]
# Of both versions, and the last of one alone.
PARTS = ["att.key", "ffn.value", "ln", "ln1.weight", "att.ln_x", "weight", "head", "emb", "ffn", "att", "att.v0"]


def checkpoint(version: str):
    """Such as releases come: vectors flat, and in block 0 of v7 a value residual that nothing reads."""
    weights, dimensions = random_checkpoint(version)
    weights = {name: tensor.flatten() if tensor.dim() == 3 and len(tensor) == 1 else tensor for name, tensor in weights.items()}
    if version == "x070":
        weights |= {f"blocks.0.att.v{i}": weights[f"blocks.1.att.v{i}"] for i in range(3)}
    return weights, dimensions


@st.composite
def profiles(draw) -> list[LayerSetting]:
    def setting(layer: str) -> LayerSetting:
        modes = {"emb": ("full",), "head": BLOCK_MODES[:-1]}.get(layer, BLOCK_MODES)
        parts = [tuple(draw(st.lists(st.sampled_from(PARTS), max_size=2))) for _ in range(2)]
        return LayerSetting(layer, draw(st.sampled_from(("freeze", *modes))), draw(st.integers(1, 30)), 8.0, 0.0, 1e-3, 1e-4,
                            reject_parts=parts[0], full_parts=parts[1])

    return [setting(layer) for layer in ("emb", "0", "1", "head")]


@settings(max_examples=60)
@given(rows=profiles(), version=st.sampled_from(VERSIONS), quantize=st.sampled_from([None, "int8"]))
def test_the_shapes_are_those_of_the_model_in_training(rows, version, quantize):
    weights, dimensions = checkpoint(version)
    try:
        expected = adapter_shapes(rows, shapes_of(weights), "p.csv")
    except UserError as error:
        # Parts of the other version, ranks above 29, the vocabulary, or all rejected; the model says the same of itself.
        with pytest.raises(UserError) as caught:
            apply_layer_profile(build_model(weights, dimensions), rows, 0)
        assert str(caught.value) == str(error).replace("p.csv", "layer profile", 1)
        return
    model = build_model(weights, dimensions, quantize=quantize, hold=quantized_linears(rows, quantize))
    apply_layer_profile(model, rows, 0)
    assert shapes_of(adapter_tensors(model)) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_linear_layers_are_told_by_their_names(version):
    weights, dimensions = checkpoint(version)
    modules = build_model(weights, dimensions).named_modules()
    linears = {f"{name}.weight" for name, module in modules if isinstance(module, Linear)}
    assert {name for name in weights if is_linear(name)} == linears and "head.weight" in linears


@pytest.mark.parametrize(("change", "said"), [
    ({"rank": 33}, "p.csv, layer 0: rank 33 is too high for mode lora and blocks.0.att.receptance (32 x 32); choose one up to"),
    ({"reject_parts": ("att.\0key",)}, r"p.csv, layer 0: RejectParts names 'att.\x00key', which is in no"),
    ({"full_parts": ("ln9",)}, "p.csv, layer 0: FullParts names 'ln9', which is in no"),
    ({"reject_parts": ("att", "ffn")}, "p.csv: it leaves nothing to train"),
    ({"mode": "freeze"}, "p.csv: it leaves nothing to train"),
    ({"layer": "2"}, "p.csv: does not have exactly the rows emb, 0 to 1, head of a model of 2 layers"),
])
def test_a_profile_that_does_not_fit_is_refused_without_a_model(change, said):
    weights, _ = checkpoint("x070")
    rows = profile("freeze", "lora", "freeze", "freeze")
    rows[1] = replace(rows[1], **change)
    with pytest.raises(UserError) as caught:
        adapter_shapes(rows, shapes_of(weights), "p.csv")
    assert str(caught.value).startswith(said)


def test_no_value_is_looked_at():
    weights, dimensions = checkpoint("x060")
    nowhere = {name: torch.empty(tensor.shape, device="meta") for name, tensor in weights.items()}
    rows = profile("full", "pissa", "state", "dora")
    model = build_model(weights, dimensions)
    apply_layer_profile(model, rows, 0)
    assert adapter_shapes(rows, shapes_of(nowhere)) == shapes_of(adapter_tensors(model))
