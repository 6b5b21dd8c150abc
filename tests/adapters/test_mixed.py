"""A profile of all modes at once on the real RWKV-6 and RWKV-7, over plain and quantized weights."""

from dataclasses import replace

import pytest
import torch

from src.adapters.apply import apply_layer_profile, parameter_groups, quantized_linears, quantized_otherwise
from src.adapters.files import load_adapter, merge_adapter, read_adapter, save_adapter
from src.adapters.layer_profile import LayerSetting
from src.adapters.modes import ADAPTERS
from src.adapters.pissa import PiSSALinear
from src.adapters.state import states_in
from src.checkpoint.io import fingerprint
from src.errors import UserError
from src.model import build_model
from src.quantization.linear import QuantizedLinear, quantize_linear
from tests.adapters.test_with_the_model import LINEARS, RANKS, TOKENS, adapted, logits
from tests.random_checkpoint import make_dimensions, random_weights

VERSIONS, SCHEMES = ["x060", "x070"], [None, "nf4", "int8"]
MODES = ("lora", "dora", "pissa", "bone", "state", "freeze", "full")
DTYPES = [torch.float32, torch.bfloat16]


def mixed(head: str = "pissa") -> list[LayerSetting]:
    """A block in each mode, the frozen one with single parameters in full."""
    values = {"rank": 4, "alpha": 8.0, "weight_lr_init": 1e-2, "weight_lr_final": 1e-3, "weight_decay": 0.01,
              "state_lr_init": 1.0, "state_lr_final": 0.1}
    blocks = [LayerSetting(str(layer), mode, **values) for layer, mode in enumerate(MODES)]
    blocks[5] = replace(blocks[5], full_parts=("ln", "att.key"), reject_parts=("ln_x",))
    return [LayerSetting("emb", "freeze"), *blocks, LayerSetting("head", head, **values)]


def checkpoint(version: str):
    dimensions = make_dimensions(version, len(MODES), n_embd=32, head_size=8, vocab_size=29, n_ffn=48, ranks=RANKS[version])
    return random_weights(dimensions), dimensions


def expected_names(version: str, head: str = "pissa") -> set[str]:
    linears = {f"{part}.{name}" for part, names in LINEARS[version].items() for name in names}
    names = {f"blocks.{layer}.{linear}.{leaf}" for layer, mode in enumerate(MODES) if mode in ADAPTERS for linear in linears
             for leaf in ADAPTERS[mode].shapes(8, 8, 4).keys() - set(ADAPTERS[mode].keeps)}
    names |= {f"head.{leaf}" for leaf in ADAPTERS[head].shapes(8, 8, 4).keys() - set(ADAPTERS[head].keeps)}
    names |= {f"blocks.5.{name}" for name in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "att.key.weight")}
    weights, _ = checkpoint(version)
    return names | {"blocks.4.att.time_state"} | {name for name in weights if name.startswith("blocks.6.")}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", SCHEMES)
def test_it_starts_as_the_model_that_references_come_from(version, dtype, quantize):
    weights, dimensions = checkpoint(version)
    reference = build_model(weights, dimensions, dtype, quantize=quantize, hold=quantized_linears(mixed(), quantize))
    start = logits(adapted(weights, dimensions, mixed(), dtype, quantize).train())
    # PiSSA's parts that cancel, and DoRA's products of a few rows more: roundings of both precisions, through seven blocks.
    assert (start - logits(reference)).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * start.norm()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantize", SCHEMES)
def test_what_trains_gets_its_gradient_and_checkpointing_changes_none(version, quantize):
    weights, dimensions = checkpoint(version)
    found = []
    for grad_cp in (False, True):
        model = adapted(weights, dimensions, mixed(), quantize=quantize, step=0.02)
        hidden, _ = model(TOKENS, torch.tensor([0, 17, 40], dtype=torch.int32), grad_cp=grad_cp)
        torch.nn.functional.cross_entropy(model.logits(hidden), TOKENS.flip(0)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == expected_names(version)
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in found[0].values())
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpointing_draws_dropout_again_and_no_other_number(version):
    weights, dimensions = checkpoint(version)
    settings = [replace(row, dropout=0.3) for row in mixed()]
    found = []
    for grad_cp in (False, True):
        model = adapted(weights, dimensions, settings, quantize="int8", step=0.02).train()
        torch.manual_seed(5)
        hidden, _ = model(TOKENS, torch.tensor([0, 17, 40], dtype=torch.int32), grad_cp=grad_cp)
        loss = hidden.square().sum()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append((*torch.autograd.grad(loss, trained, allow_unused=True), torch.rand(3)))
    for plain, again in zip(*found, strict=True):
        assert plain is again is None or torch.equal(plain, again)


def merged_logits(weights, dimensions, path):
    """Of the merged checkpoint, begun from the states that no weight can express."""
    merged = merge_adapter(weights, path)
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {name: (t.shape, t.dtype) for name, t in weights.items()}
    model = build_model(merged, dimensions)
    states = states_in(read_adapter(path).weights)
    assert states.keys() == {"blocks.4.att.time_state"}
    model.blocks[4].att.time_state = torch.nn.Parameter(states["blocks.4.att.time_state"])
    return logits(model)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("head", ADAPTERS)
def test_merged_it_is_the_same_model(version, head, tmp_path):
    weights, dimensions = checkpoint(version)
    model, path = adapted(weights, dimensions, mixed(head), step=0.02), tmp_path / "adapter.safetensors"
    save_adapter(model, path, mixed(head), fingerprint(weights), {})
    expected = logits(model)
    # float32 through seven layers, the adapters added to the weights instead of to the outputs.
    assert (merged_logits(weights, dimensions, path) - expected).norm() < 2e-5 * expected.norm()
    assert (logits(build_model(weights, dimensions)) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_merging_over_a_quantized_base_leaves_out_the_quantization_error_alone(version, quantize, tmp_path):
    """Merged into the weights that the quantized model holds, instead of the checkpoint's, it is the same model."""
    weights, dimensions = checkpoint(version)
    model, path = adapted(weights, dimensions, mixed(), quantize=quantize, step=0.02), tmp_path / "adapter.safetensors"
    held = dict(weights)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            adapter = model.get_submodule(name.removesuffix(".base"))
            split = adapter.start_B @ adapter.start_A if isinstance(adapter, PiSSALinear) else 0
            held[f"{name.removesuffix('.base')}.weight"] = module.dequantize(torch.float32) + split
    linears = sum(map(len, LINEARS[version].values()))
    assert sum(held[name] is not weights[name] for name in weights) == 6 * linears - 1  # six blocks, less one key in full
    save_adapter(model, path, mixed(), fingerprint(held), {})
    expected = logits(model)
    assert (merged_logits(held, dimensions, path) - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantize", SCHEMES)
def test_a_file_gives_the_same_model(version, quantize, tmp_path):
    weights, dimensions = checkpoint(version)
    model = adapted(weights, dimensions, mixed(), quantize=quantize, step=0.02)
    save_adapter(model, tmp_path / "adapter.safetensors", mixed(), fingerprint(weights), {})
    kept = {f"blocks.2.{part}.{name}.start_{leaf}" for part, names in LINEARS[version].items() for name in names for leaf in "AB"}
    assert read_adapter(tmp_path / "adapter.safetensors").weights.keys() == (
        expected_names(version) | kept | {"head.start_A", "head.start_B"})
    again = adapted(weights, dimensions, mixed(), quantize=quantize, seed=1)
    load_adapter(again, tmp_path / "adapter.safetensors", fingerprint(weights))
    assert torch.equal(logits(again), logits(model))


def test_a_quantized_model_keeps_plain_what_trains_in_full_and_splits_what_pissa_takes():
    weights, dimensions = checkpoint("x070")
    model = build_model(weights, dimensions, quantize="int8", hold=quantized_linears(mixed(), "int8"))
    kinds = {name: type(module) for name, module in model.named_modules()}
    for layer, mode in enumerate(MODES):
        for part in ("att.key", "att.value", "ffn.key"):
            plain = mode == "full" or (layer == 5 and part == "att.key")
            kind = kinds[f"blocks.{layer}.{part}"]
            assert kind is (PiSSALinear if mode == "pissa" else QuantizedLinear) if not plain else kind is not QuantizedLinear
    linears = {f"blocks.2.{part}.{name}.weight": "pissa 4" for part, names in LINEARS["x070"].items() for name in names}
    assert quantized_otherwise(mixed(), weights) == linears | {"blocks.5.att.key.weight": "full"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("part", ["lora_A", "start_B", "base"])
def test_parts_are_those_of_the_base_whatever_adapters_it_is_built_with(part):
    weights, dimensions = checkpoint("x070")
    model = build_model(weights, dimensions, quantize="int8", hold=quantized_linears(mixed(), "int8"))
    for change in ({"full_parts": (part,)}, {"reject_parts": (part,)}):
        settings = mixed()
        settings[3] = replace(settings[3], **change)  # block 2, whose adapters PiSSA has made
        with pytest.raises(UserError, match=f"layer 2: .* names '{part}', which is in no parameter's name"):
            apply_layer_profile(model, settings, 0)


def test_a_model_quantized_without_the_profile_is_refused():
    weights, dimensions = checkpoint("x070")
    def hold(name, weight):
        return quantize_linear(weight, "int8") if name.startswith(("blocks.2.", "blocks.5.")) else None

    for settings, said in ((mixed(), "quantized_linears"), ([replace(s, mode="freeze") for s in mixed()], "cannot be trained")):
        with pytest.raises(ValueError, match=said):
            apply_layer_profile(build_model(weights, dimensions, quantize="int8", hold=hold), settings, 0)


def test_weight_decay_reaches_the_adapters_matrices_and_not_magnitudes_or_states():
    weights, dimensions = checkpoint("x070")
    model = adapted(weights, dimensions, mixed())
    found = {name: (group["lr_init"], group["weight_decay"]) for group in parameter_groups(model, mixed())
             for name in group["names"]}
    assert found.keys() == expected_names("x070")
    assert found["blocks.4.att.time_state"] == (1.0, 0.0)
    for name in ("blocks.1.att.key.lora_M", "blocks.5.ln1.weight", "blocks.6.att.w0"):
        assert found[name] == (1e-2, 0.0)
    for name in ("blocks.0.att.key.lora_A", "blocks.1.att.key.lora_B", "blocks.2.ffn.key.lora_B", "blocks.3.att.key.disha",
                 "blocks.5.att.key.weight", "blocks.6.ffn.key.weight", "head.lora_A"):
        assert found[name] == (1e-2, 0.01)
