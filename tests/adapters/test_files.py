"""Adapter files: back to the same model, merged into the same outputs, and refused where they do not belong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from src.adapters import files
from src.adapters.apply import apply_layer_profile, blocks_to_quantize
from src.adapters.files import load_adapter, merge_adapter, read_adapter, save_adapter
from src.adapters.layer_profile import LayerSetting
from src.checkpoint.io import fingerprint
from src.errors import NotFinite, UserError
from tests.adapters.tiny import profile, tiny_model, tiny_weights

TOKENS = torch.arange(11)
MIXED = profile("full", "full", "lora", "lora")
EXTRA = {"step": 12, "arguments": {"dpo_beta": 0.01, "name": "Ā"}}


def adapted(weights, settings: list[LayerSetting] = MIXED, seed: int = 0, quantize: str | None = None):
    """A model whose trained parameters have all moved, as after some steps."""
    model = tiny_model(weights, quantize, blocks_to_quantize(settings) if quantize else set())
    apply_layer_profile(model, settings, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def saved(model, path, settings=MIXED, base=None):
    save_adapter(model, path, settings, fingerprint(tiny_weights()) if base is None else base, EXTRA)
    return path


def rewrite(path, change_tensors=None, change_metadata=None):
    """Change a file behind the program's back."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata)


def in_row(**changes):
    """Change the profile's row of layer 1 in the metadata."""

    def change(metadata):
        rows = json.loads(metadata["profile"])
        rows[2].update(changes)
        metadata["profile"] = json.dumps(rows)

    return change


def test_a_file_holds_what_trains_and_what_it_belongs_to(tmp_path):
    model = adapted(tiny_weights())
    path = saved(model, tmp_path / "adapter.safetensors")
    adapter = read_adapter(path)
    expected = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapter.weights.keys() == expected.keys() and "blocks.1.att.key.lora_A" in expected
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]) for name, tensor in adapter.weights.items())
    assert adapter.settings == MIXED and adapter.extra == EXTRA and adapter.base_fingerprint == fingerprint(tiny_weights())
    assert not [other for other in tmp_path.iterdir() if other != path]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_load_gives_the_same_model(tmp_path, quantize):
    weights = tiny_weights()
    model = adapted(weights, quantize=quantize)
    path = saved(model, tmp_path / "adapter.safetensors")
    other = adapted(weights, seed=1, quantize=quantize)
    assert not torch.equal(other(TOKENS), model(TOKENS))
    adapter = load_adapter(other, path, fingerprint(weights))
    assert torch.equal(other(TOKENS), model(TOKENS)) and adapter.extra == EXTRA


@pytest.mark.parametrize("modes", [("freeze", "lora", "lora", "freeze"), ("full", "full", "lora", "lora")])
def test_a_merged_checkpoint_gives_the_adapter_models_logits(tmp_path, modes):
    weights, settings = tiny_weights(), profile(*modes)
    model = adapted(weights, settings)
    merged = merge_adapter(weights, saved(model, tmp_path / "adapter.safetensors", settings))
    assert list(merged) == list(weights)
    expected = model(TOKENS)
    # float32 through two blocks, the LoRA added to the weight instead of the output.
    assert (tiny_model(merged)(TOKENS) - expected).norm() < 1e-5 * expected.norm()
    assert (tiny_model(weights)(TOKENS) - expected).norm() > 1e-2 * expected.norm()


def test_merging_keeps_the_bases_precision_and_leaves_the_base_alone(tmp_path):
    weights = {name: tensor.bfloat16() if "ln" not in name else tensor for name, tensor in tiny_weights().items()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    model = adapted(weights)
    path = saved(model, tmp_path / "adapter.safetensors", base=fingerprint(weights))
    merged = merge_adapter(weights, path)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert all(merged[name].dtype == weights[name].dtype and merged[name].shape == weights[name].shape for name in weights)
    layer = model.blocks[1].ffn.key
    exact = weights["blocks.1.ffn.key.weight"].double() + 8.0 / 4 * (layer.lora_B.double() @ layer.lora_A.double())
    # One rounding to bf16, after float32's.
    assert ((merged["blocks.1.ffn.key.weight"] - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()
    assert merged["blocks.1.ln1.weight"] is weights["blocks.1.ln1.weight"]
    assert torch.equal(merged["blocks.0.ln1.weight"], model.blocks[0].ln1.weight)


def test_merging_with_another_base_names_both(tmp_path):
    path = saved(adapted(tiny_weights()), tmp_path / "adapter.safetensors")
    ours, theirs = fingerprint(tiny_weights()), fingerprint(tiny_weights(seed=1))
    for attempt in (lambda: merge_adapter(tiny_weights(seed=1), path),
                    lambda: load_adapter(adapted(tiny_weights()), path, theirs)):
        with pytest.raises(UserError) as caught:
            attempt()
        assert all(part in str(caught.value) for part in (str(path), ours, theirs))


def test_loading_without_a_fingerprint_to_compare(tmp_path):
    model = adapted(tiny_weights())
    load_adapter(model, saved(model, tmp_path / "adapter.safetensors", base="0" * 64))


@pytest.mark.parametrize(("settings", "said"), [
    (profile("freeze", "full", "lora", "lora"), "the file has emb.weight"),
    (profile("full", "full", "lora", "full"), "the file lacks ln_out.weight, which the model's layer profile has; use"),
    (profile("full", "full", "full", "lora"), "blocks.1"),
    (profile("full", "full", "lora", "lora", rank=5), r"lora_A has shape \(4, 16\), expected \(5, 16\)"),
    (profile("full", "full", "lora", "lora", alpha=9.0), r"blocks.1.att.receptance was trained with alpha 8.0.* says 9.0"),
])
def test_loading_into_a_model_of_another_profile_is_refused_and_changes_nothing(tmp_path, settings, said):
    path = saved(adapted(tiny_weights()), tmp_path / "adapter.safetensors")
    model = adapted(tiny_weights(), settings, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        load_adapter(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("change_tensors", "change_metadata", "said"), [
    (lambda t: t.pop("blocks.1.att.key.lora_B"), None, "the file lacks blocks.1.att.key.lora_B, which its own"),
    (lambda t: t.pop("blocks.1.att.key.lora_A"), None, "the file lacks blocks.1.att.key.lora_A, which its own"),
    (lambda t: t.update({"blocks.1.att.kay.weight": torch.ones(2)}), None, "has blocks.1.att.kay.weight, which its own"),
    (lambda t: t.update({"blocks.1.att.kay.lora_A": torch.ones(2)}), None, "has blocks.1.att.kay.lora_A, which its own"),
    (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")], None, "lacks blocks.1.att.receptance.lora_A"),
    (lambda t: t.clear(), None, "the file lacks emb.weight"), (None, in_row(mode="full"), "the file lacks blocks.1.ln1.weight"),
    (lambda t: t.update({"blocks.1.ln1.weight": torch.ones(16)}), None, "has blocks.1.ln1.weight, which its own"),
    (lambda t: t.update({"blocks.1.att.key.weight": torch.ones(16, 16)}), None, "has blocks.1.att.key.weight, which its own"),
    (lambda t: t.update({"blocks.1.att.time_state": torch.ones(2, 8, 8)}), None, "has blocks.1.att.time_state, which its own"),
    (lambda t: t.update({"blocks.1.ln1.weight": torch.ones(16, dtype=torch.int64)}), None, "ln1.weight holds int64, expected fl"),
    (lambda t: t.update({"blocks.0.ln1.weight": torch.ones(16) > 0}), None, "blocks.0.ln1.weight holds bool, expected floating"),
    (lambda t: t.update({"blocks.0.ln1.weight": torch.ones(16).double() * 1e300}), None, "ln1.weight .16 of 16 "),
    (None, in_row(reject_parts=["att.key"]), "has blocks.1.att.key.lora_A, which its own layer profile lacks"),
    (None, in_row(reject_parts=["att.kay"]), "the layer profile in it, layer 1: RejectParts names 'att.kay'"),
    (None, in_row(rank=5), r"lora_A has shape \(4, 16\), expected \(5, 16\) by its own"),
    (None, in_row(rank=17), "the layer profile in it, layer 1: rank 17 is too high"),
    (None, in_row(mode="bone"), "lacks blocks.1.att.receptance.disha"),
    (None, in_row(mode="freeze"), r"the file has blocks.1.(att|ffn).\w+.lora_A, which its own"),
    (None, lambda m: m.update(profile=json.dumps(json.loads(m["profile"])[::-1])), "rows are not emb, 0, 1, ... head"),
    (lambda t: t.update({"blocks.0.ln1.weight": torch.ones(2)}), None, "blocks.0.ln1.weight has shape"),
    (lambda t: t.update({"blocks.1.att.key.lora_A": torch.ones(4, 15)}), None, "lora_A has shape"),
    (lambda t: t.update({"blocks.1.att.key.lora_A": torch.ones(3, 16)}), None, "lora_A has shape"),
    (lambda t: t.update({"blocks.1.att.key.lora_B": torch.ones(16)}), None, "lora_B has shape"),
    (None, lambda m: m.update(profile=m["profile"].replace('"rank": 4', '"rank": 0')),
     "profile.2. .layer 1.: Rank must be above 0 in mode lora"),
    (None, lambda m: m.update(profile=json.dumps([*json.loads(m["profile"]), json.loads(m["profile"])[0]])), "two profile rows"),
    (lambda t: t.update({"blocks.7.att.key.lora_A": torch.ones(4, 16)}), None, "damaged .no profile row for layer 7"),
    (lambda t: t.update({"blocks.7": torch.ones(4, 16)}), None, "damaged"),
    (None, lambda m: m.pop("adapter_format"), "not an adapter file"),
    (None, lambda m: m.update(adapter_format="2"), "adapter format 2"),
    (None, lambda m: m.pop("profile"), "damaged"),
    (None, lambda m: m.update(profile="[{]"), "damaged"),
    (None, lambda m: m.update(profile=json.dumps([{"layer": "0", "reject_parts": [], "colour": 1}])), "damaged"),
    (None, lambda m: m.update(profile="[3]"), r"profile\[0\] is a whole number|\[0\] is a whole number"),
    *[(None, in_row(**{name: value}), said) for name, value, said in (
        ("layer", 1, "layer is a whole number"), ("layer", "7", "7 is not in the"), ("layer", "0", "no profile row for"),
        ("mode", None, "mode is null"), ("mode", "klingon", "unknown mode 'klingon'"), ("mode", "emb", "unknown mode"),
        ("rank", 4.0, "rank is a number"), ("rank", "4", "rank is text"), ("rank", None, "rank is null"),
        ("rank", True, "rank is true or false"), ("rank", 10 ** 12, "Rank is 1000000000000"), ("rank", -4, "Rank is -4"),
        ("alpha", "8", "alpha is text"), ("alpha", -8.0, "Alpha is -8.0"), ("alpha", 1e38, "Alpha is 1e.38"),
        ("alpha", 0, "Alpha must be above 0"), ("dropout", 1.0, "Dropout is 1.0"), ("alpha", 1e-320, "Alpha is 1e-320"),
        ("weight_decay", 1e300, "Weight_decay is 1e.300"), ("state_lr_init", 1e-300, "State_lr_init is 1e-300"),
        ("weight_lr_init", -1e-3, "Weight_lr_init is"),
        ("reject_parts", [3], "reject_parts.0. is a whole number"),
        ("full_parts", "ln1", "full_parts is text"), ("full_parts", {}, "full_parts is an object"))],
    (None, lambda m: m.update(profile=m["profile"].replace('"alpha": 8.0', '"alpha": NaN')), "it holds NaN"),
    (None, lambda m: m.update(profile=m["profile"].replace('"alpha": 8.0', '"alpha": 1e999')), "it holds 1e999"),
    (None, lambda m: m.update(profile=m["profile"].replace('"dropout": 0.0', '"dropout": 1e-999')), "it holds 1e-999"),
    (None, lambda m: m.update(profile="[" * 100_000 + "]" * 100_000), "nested more than"),
    (None, lambda m: m.update(extra="[" * 100_000 + "]" * 100_000), "nested more than"),
    (None, lambda m: m.update(extra="[]"), "it is a list"), (None, lambda m: m.update(extra='{"step": Infinity}'), "Infinity"),
    (None, lambda m: m.pop("extra"), "it lacks 'extra'"),
    (None, lambda m: m.update(base_fingerprint="\x1b[2J"), "is not a fingerprint"),
])
def test_a_broken_file_is_refused_in_one_line(tmp_path, change_tensors, change_metadata, said):
    path = saved(adapted(tiny_weights()), tmp_path / "adapter.safetensors")
    rewrite(path, change_tensors, change_metadata)
    with pytest.raises(UserError, match=said) as caught:
        merge_adapter(tiny_weights(), path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.update({"blocks.1.att.time_state": torch.ones(1)}), r"time_state has shape \(1,\), expected \(2, 8, 8\)"),
    (lambda t: t.pop("blocks.1.att.time_state"), "the file lacks blocks.1.att.time_state, which its own"),
    (lambda t: t.update({"blocks.0.att.time_state": torch.ones(2, 8, 8)}), "the file has blocks.0.att.time_state, which its own"),
    (lambda t: t.update({"head.att.time_state": torch.ones(2, 8, 8)}), "the file has head.att.time_state, which its own"),
    (lambda t: t.update({"blocks.1.att.time_state": t["blocks.1.att.time_state"].long()}), "time_state holds int64"),
    (lambda t: t.update({"blocks.1.att.time_state": t["blocks.1.att.time_state"].double() * 1e300}), "128 of 128 .* not finite"),
    (lambda t: t.pop("blocks.0.ffn.key.weight"), "the file lacks blocks.0.ffn.key.weight, which its own"),
])
def test_states_and_full_layers_are_looked_at_like_adapters(tmp_path, change, said):
    settings = profile("freeze", "full", "state", "freeze", state_lr_init=1.0, state_lr_final=0.1)
    path = saved(adapted(tiny_weights(), settings), tmp_path / "adapter.safetensors", settings)
    assert merge_adapter(tiny_weights(), path)["blocks.1.att.key.weight"].equal(tiny_weights()["blocks.1.att.key.weight"])
    rewrite(path, change)
    model = adapted(tiny_weights(), settings, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=said):
        merge_adapter(tiny_weights(), path)
    with pytest.raises(UserError, match=said.replace("its own", "the model's")):
        load_adapter(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_for_another_depth_is_refused(tmp_path):
    path = saved(adapted(tiny_weights()), tmp_path / "adapter.safetensors")
    rewrite(path, lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.")],
            lambda m: m.update(profile=json.dumps([row for row in json.loads(m["profile"]) if not row["layer"].isdigit()])))
    with pytest.raises(UserError, match="the layer profile in it: does not have exactly the rows emb, 0 to 1, head"):
        merge_adapter(tiny_weights(), path)
    with pytest.raises(UserError, match="the layer profile in it has no row for layer 1"):
        load_adapter(adapted(tiny_weights()), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_another_precision_come_in_float32(tmp_path, dtype):
    path = saved(adapted(tiny_weights()), tmp_path / "adapter.safetensors")
    exact = read_adapter(path).weights
    rewrite(path, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    found = read_adapter(path).weights
    assert all(found[name].equal(tensor.to(dtype).float()) for name, tensor in exact.items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_is_missing_or_something_else_is_refused(tmp_path, content):
    path = tmp_path / "adapter.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="adapter.safetensors"):
        merge_adapter(tiny_weights(), path)


def test_an_ordinary_checkpoint_is_no_adapter(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny_weights(), path)
    with pytest.raises(UserError, match="not an adapter file"):
        read_adapter(path)


def spoiled(path, value: float, name: str = "blocks.1.att.key.lora_A"):
    rewrite(path, lambda tensors: tensors[name].view(-1)[:3].fill_(value))
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_file_that_is_not_finite_is_refused_by_its_tensor(tmp_path, value):
    path = spoiled(saved(adapted(tiny_weights()), tmp_path / "adapter.safetensors"), value)
    said = f"{path}: blocks.1.att.key.lora_A (3 of 64 values) are not finite"
    model = adapted(tiny_weights(), seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for attempt in (lambda: read_adapter(path), lambda: merge_adapter(tiny_weights(), path), lambda: load_adapter(model, path)):
        with pytest.raises(NotFinite) as caught:
            attempt()
        assert str(caught.value).startswith(said)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_not_finite_does_not_replace_a_good_one(tmp_path):
    settings = profile("freeze", "lora", "state", "freeze", state_lr_init=1.0, state_lr_final=0.1)
    model = adapted(tiny_weights(), settings)
    path = saved(model, tmp_path / "adapter.safetensors", settings)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"adapter.safetensors", "adapter.state.pth"}
    for name in ("blocks.0.ffn.key.lora_B", "blocks.1.att.time_state"):
        with torch.no_grad():
            kept = model.get_parameter(name).clone()
            model.get_parameter(name).view(-1)[0] = torch.inf
            with pytest.raises(NotFinite, match=rf"adapter.safetensors: not written, since {name} \(1 of "):
                saved(model, path, settings)
            model.get_parameter(name).copy_(kept)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e3), (torch.bfloat16, 2e19)])
def test_a_merge_that_overflows_the_bases_precision_is_refused(tmp_path, dtype, size):
    weights = {name: tensor.to(dtype) for name, tensor in tiny_weights().items()}
    path = saved(adapted(weights, quantize=None), tmp_path / "adapter.safetensors", base=fingerprint(weights))
    assert all(torch.isfinite(tensor).all() for tensor in merge_adapter(weights, path).values())
    rewrite(path, lambda tensors: [tensors[f"blocks.1.att.key.lora_{leaf}"].fill_(size) for leaf in "AB"])
    with pytest.raises(NotFinite) as caught:
        merge_adapter(weights, path)
    said = "merged into the base, blocks.1.att.key.weight (256 of 256 values) are not finite in its"
    assert str(caught.value).startswith(f"{path}: {said} {str(dtype).removeprefix('torch.')}")


def test_a_merge_reads_the_adapter_and_looks_at_each_tensor_of_the_base_no_more_than_once(tmp_path, monkeypatch):
    weights = tiny_weights()
    settings = profile("freeze", "lora", "lora", "freeze")
    adapter = read_adapter(saved(adapted(weights, settings), tmp_path / "adapter.safetensors", settings, fingerprint(weights)))
    looked_at = []
    monkeypatch.setattr(files, "read_adapter", None)
    monkeypatch.setattr(files, "fingerprint", None)
    monkeypatch.setattr(files, "not_finite", lambda tensors: looked_at.extend(tensors))
    merged = merge_adapter(weights, adapter, fingerprint(weights))
    assert sorted(looked_at) == sorted(name for name in weights if merged[name] is not weights[name]) and looked_at
    load_adapter(adapted(weights, settings), adapter, fingerprint(weights))


def test_long_names_are_cut_in_messages(tmp_path):
    settings = profile("freeze", "lora", "lora", "freeze")
    path = saved(adapted(tiny_weights(), settings), tmp_path / "adapter.safetensors", settings)
    long = "blocks.0." + "n" * 50_000
    for value in (0.0, torch.nan):
        rewrite(path, lambda tensors: tensors.update({long: torch.full((2,), value)}))  # noqa: B023
        model = adapted(tiny_weights(), settings)
        for attempt in (lambda: merge_adapter(tiny_weights(), path), lambda: load_adapter(model, path)):  # noqa: B023
            with pytest.raises(UserError) as caught:
                attempt()
            assert len(str(caught.value)) < len(str(path)) + 400
