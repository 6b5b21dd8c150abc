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
from src.adapters.tensors import adapter_shapes, is_linear, settings_for, shapes_of
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


def names_of(row: LayerSetting) -> set[str]:
    """What a profile of this row alone trains in block 0 of a v7, by the names there."""
    weights, _ = checkpoint("x070")
    rows = [LayerSetting("emb", "freeze"), replace(row, layer="0"), LayerSetting("1", "freeze"), LayerSetting("head", "freeze")]
    found = adapter_shapes(rows, shapes_of(weights), "p.csv")
    assert all(name.startswith("blocks.0.") for name in found)
    return {name.removeprefix("blocks.0.") for name in found}


def test_the_value_residual_that_nothing_reads_does_not_train():
    weights, _ = checkpoint("x070")
    own = {name.removeprefix("blocks.0.") for name in weights if name.startswith("blocks.0.")}
    assert names_of(LayerSetting("", "full")) == own - {"att.v0", "att.v1", "att.v2"} and "att.v0" in own


def test_reject_parts_may_name_the_state_and_what_does_not_train_anyway():
    assert names_of(LayerSetting("", "state")) == {"att.time_state"}
    assert names_of(LayerSetting("", "state", full_parts=("ln1",), reject_parts=("time_state",))) == {"ln1.weight", "ln1.bias"}
    assert names_of(LayerSetting("", "state", full_parts=("ln1",), reject_parts=("ln1",))) == {"att.time_state"}
    assert names_of(LayerSetting("", "freeze", full_parts=("ln1",), reject_parts=("bias",))) == {"ln1.weight"}
    assert names_of(LayerSetting("", "bone", 4, reject_parts=("ffn", "time_state"))) == {
        f"att.{name}.disha" for name in ("receptance", "key", "value", "output")}


def test_parts_of_a_layer_without_any_training_are_not_looked_at():
    weights, _ = checkpoint("x070")
    rows = profile("freeze", "lora", "freeze", "freeze")
    expected = adapter_shapes(rows, shapes_of(weights))
    rows[0] = replace(rows[0], reject_parts=("nothing of the kind",))
    assert adapter_shapes(rows, shapes_of(weights)) == expected
    rows[2] = replace(rows[2], full_parts=("ln1",), reject_parts=("nothing of the kind",))
    with pytest.raises(UserError, match="layer 1: RejectParts names 'nothing of the kind'"):
        adapter_shapes(rows, shapes_of(weights))


@pytest.mark.parametrize(("mode", "part", "largest"), [
    ("lora", "att.key", 32), ("dora", "ffn.key", 32), ("pissa", "ffn.value", 32),
    ("bone", "att.key", 32), ("bone", "ffn.key", 32), ("bone", "ffn.value", 48)])
def test_the_largest_rank_is_the_smaller_side_or_bones_inputs(mode, part, largest):
    """Of a v7 with a width of 32 and an FFN of 48."""
    others = tuple({"att", "ffn.key", "ffn.value"} - {part}) if part != "att.key" else ("ffn", "att.v", "att.r", "att.o")
    assert all(name.startswith(part) for name in names_of(LayerSetting("", mode, largest, 8.0, reject_parts=others)))
    with pytest.raises(UserError, match=f"rank {largest + 1} is too high for mode {mode} and blocks.0.{part} .* up to {largest}"):
        names_of(LayerSetting("", mode, largest + 1, 8.0, reject_parts=others))


PROFILE = "Layer,Mode,Rank,Alpha,{}\nemb,freeze\n0,lora,4,8,{}\n1,bone,5,8,{}\nhead,freeze\n"
RATES = ("Weight_lr_init,Weight_lr_final", "1e-3,1e-4", "1e-3,1e-4")


def test_settings_come_from_the_flags_or_from_the_file(tmp_path):
    weights, _ = checkpoint("x070")
    automatic = settings_for(weights, "auto", "dora", 3, 7.0, (1e-2, 1e-5))
    assert [(row.layer, row.mode) for row in automatic] == [("emb", "freeze"), ("0", "dora"), ("1", "dora"), ("head", "freeze")]
    assert {(row.rank, row.alpha, *row.rates("att.key.weight")) for row in automatic[1:3]} == {(3, 7.0, 1e-2, 1e-5)}
    path = tmp_path / "p.csv"
    for columns, rates in ((RATES, (1e-3, 1e-4)), (("LRScale", "1", "1"), (1e-2, 1e-5))):
        path.write_text(PROFILE.format(*columns))
        read = settings_for(weights, str(path), "dora", 3, 7.0, (1e-2, 1e-5))
        assert [(row.mode, row.rank) for row in read] == [("freeze", 0), ("lora", 4), ("bone", 5), ("freeze", 0)]
        assert {row.rates("att.key.weight") for row in read[1:3]} == {rates}


@pytest.mark.parametrize(("change", "said"), [
    (("1,bone,5", "1,bone,33"), "layer 1: rank 33 is too high"), (("1,bone", "1,wool"), "unknown mode 'wool'"),
    (("1,bone,5,8,1e-3,1e-4\n", ""), "no row for layer 1"), (("bone", "freeze"), None)])
def test_a_file_is_checked_against_the_base_and_named(tmp_path, change, said):
    weights, _ = checkpoint("x070")
    path = tmp_path / "p.csv"
    path.write_text(PROFILE.format(*RATES).replace(*change))
    if said is None:
        assert settings_for(weights, str(path), "lora", 4)[2].mode == "freeze"
        return
    with pytest.raises(UserError) as caught:
        settings_for(weights, str(path), "lora", 4)
    assert str(caught.value).startswith(f"layer profile {path}") and said in str(caught.value)


def test_no_value_is_looked_at():
    weights, dimensions = checkpoint("x060")
    nowhere = {name: torch.empty(tensor.shape, device="meta") for name, tensor in weights.items()}
    rows = profile("full", "pissa", "state", "dora")
    model = build_model(weights, dimensions)
    apply_layer_profile(model, rows, 0)
    assert adapter_shapes(rows, shapes_of(nowhere)) == shapes_of(adapter_tensors(model))
