"""What trains, at which precision, and in which optimizer group, on a small model with the official names."""

from dataclasses import replace

import pytest
import torch

from src.adapters.apply import apply_layer_profile, blocks_to_quantize, how_quantized, parameter_groups, quantized_linears
from src.adapters.lora import LoRALinear
from src.adapters.pissa import PiSSALinear
from src.errors import UserError
from src.quantization.linear import QuantizedLinear
from tests.adapters.tiny import Tiny, profile, tiny_model, tiny_weights

TOKENS = torch.arange(11)
LINEARS = ["att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value"]


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_names(*layers: str) -> set[str]:
    return {f"{layer}.{leaf}" for layer in layers for leaf in ("lora_A", "lora_B")}


def test_lora_covers_the_linear_weights_of_a_block_and_nothing_else():
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, profile("freeze", "freeze", "lora", "freeze"), seed=0)
    assert trained(model) == lora_names(*(f"blocks.1.{name}" for name in LINEARS))
    assert not any(isinstance(module, LoRALinear) for module in model.blocks[0].modules())


def test_full_trains_all_of_a_layer_with_ln0_in_block_0_and_ln_out_with_the_head():
    weights = tiny_weights()
    block0 = tiny_model(weights)
    apply_layer_profile(block0, profile("freeze", "full", "freeze", "freeze"), seed=0)
    assert trained(block0) == {name for name in weights if name.startswith("blocks.0.")}
    assert "blocks.0.ln0.bias" in trained(block0)
    ends = tiny_model(weights)
    apply_layer_profile(ends, profile("full", "freeze", "freeze", "full"), seed=0)
    assert trained(ends) == {"emb.weight", "ln_out.weight", "ln_out.bias", "head.weight"}


def test_lora_on_the_head():
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, profile("freeze", "freeze", "freeze", "lora"), seed=0)
    assert trained(model) == lora_names("head")


def test_rejected_parts_stay_untrained():
    lora = tiny_model(tiny_weights())
    apply_layer_profile(lora, profile("freeze", "lora", "freeze", "freeze", reject_parts=("att.key", "ffn")), seed=0)
    assert trained(lora) == lora_names("blocks.0.att.receptance", "blocks.0.att.value", "blocks.0.att.output")
    assert not isinstance(lora.blocks[0].ffn.key, LoRALinear)
    weights = tiny_weights()
    full = tiny_model(weights)
    apply_layer_profile(full, profile("freeze", "full", "freeze", "full", reject_parts=("att.w", "ln", "x_k")), seed=0)
    assert trained(full) == {name for name in weights if name.startswith(("blocks.0.", "head"))
                             and not any(part in name for part in ("att.w", "ln", "x_k"))}


def test_a_rejected_part_that_is_nowhere_is_refused_where_something_trains():
    settings = profile("freeze", "lora", "lora", "freeze", reject_parts=("att.kay",))
    with pytest.raises(UserError, match=r"layer 0: RejectParts names 'att.kay'"):
        apply_layer_profile(tiny_model(tiny_weights()), settings, seed=0)
    freeze = [replace(setting, mode="freeze") for setting in settings[:-1]]
    with pytest.raises(UserError, match="nothing to train"):
        apply_layer_profile(tiny_model(tiny_weights()), [*freeze, settings[-1]], seed=0)


def test_a_rank_above_the_weights_smaller_side_is_refused():
    with pytest.raises(UserError, match=r"layer 1: rank 17 .*blocks.1.att.receptance \(16 x 16\)"):
        apply_layer_profile(tiny_model(tiny_weights()), profile("freeze", "freeze", "lora", "freeze", rank=17), seed=0)


def test_a_profile_for_another_depth_is_refused():
    settings = profile("freeze", "lora", "lora", "freeze")
    with pytest.raises(UserError, match="layer profile: does not have exactly the rows emb, 0 to 1, head"):
        apply_layer_profile(tiny_model(tiny_weights()), [*settings[:2], settings[-1]], seed=0)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_the_output_is_unchanged_by_any_profile(quantize):
    for modes in [("freeze", "lora", "lora", "lora"), ("full", "full", "lora", "full"), ("freeze", "full", "freeze", "lora")]:
        settings = profile(*modes, dropout=0.3)
        model = tiny_model(tiny_weights(), quantize, blocks_to_quantize(settings) if quantize else set())
        before = model(TOKENS)
        apply_layer_profile(model, settings, seed=0)
        assert torch.equal(model.train()(TOKENS), before)


def test_a_model_with_other_adapters_is_refused():
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, profile("freeze", "lora", "lora", "freeze"), seed=0)
    with pytest.raises(ValueError, match="blocks.0.att.receptance already has another adapter than bone"):
        apply_layer_profile(model, profile("freeze", "bone", "bone", "freeze"), seed=0)


def test_blocks_in_full_mode_are_not_quantized():
    assert blocks_to_quantize(profile("freeze", "full", "lora", "full")) == {1}
    assert blocks_to_quantize(profile("full", "freeze", "lora", "freeze")) == {0, 1}
    model = tiny_model(tiny_weights(), "int8", {0, 1})
    with pytest.raises(ValueError, match="blocks.0.att.receptance is quantized"):
        apply_layer_profile(model, profile("freeze", "full", "lora", "freeze"), seed=0)


def test_how_a_model_holds_its_weights_is_told():
    """As the sidecar of a `.save` has it: blocks in mode full, and single weights that are not just quantized."""
    names = set(tiny_weights())
    nothing = {"unquantized_blocks": [], "quantized_otherwise": {}}
    full = profile("full", "full", "lora", "lora")
    assert how_quantized(full, names, "nf4") == {"quantization": "nf4", "unquantized_blocks": [0], "quantized_otherwise": {}}
    assert how_quantized(full, names, None) == {"quantization": None} | nothing
    rank = profile("freeze", "lora", "pissa", "freeze")[2].rank
    parts = [replace(setting, full_parts=("att.key",)) if setting.layer == "0" else setting
             for setting in profile("freeze", "lora", "pissa", "freeze")]
    assert how_quantized(parts, names, None) == {"quantization": None} | nothing
    assert how_quantized(parts, names, "int8") == {"quantization": "int8", "unquantized_blocks": [], "quantized_otherwise": {
        "blocks.0.att.key.weight": "full", **{f"blocks.1.{name}.weight": f"pissa {rank}" for name in LINEARS}}}


def test_how_each_linear_weight_is_held():
    weight = tiny_weights()["blocks.0.att.key.weight"]
    settings = profile("freeze", "full", "pissa", "freeze")
    assert quantized_linears(settings, None) is None
    hold = quantized_linears(settings, "int8")
    assert hold("blocks.0.att.key", weight) is None
    assert isinstance(hold("blocks.1.att.key", weight), PiSSALinear)
    # One trains all but its key, which no adapter is beside: it stays exact with the rest of the block.
    rejecting = quantized_linears([replace(setting, reject_parts=("att.key",)) for setting in settings], "int8")
    assert rejecting("blocks.0.att.key", weight) is None
    wide = quantized_linears([replace(setting, rank=min(weight.shape) + 1) for setting in settings], "int8")
    with pytest.raises(UserError, match=r"layer 1: rank \d+ is too high"):
        wide("blocks.1.att.key", weight)


def test_quantized_layers_get_lora_over_the_quantized_weight():
    model = tiny_model(tiny_weights(), "nf4", {0, 1})
    apply_layer_profile(model, profile("freeze", "lora", "freeze", "freeze"), seed=0)
    assert trained(model) == lora_names(*(f"blocks.0.{name}" for name in LINEARS))
    assert isinstance(model.blocks[0].att.key.base, QuantizedLinear) and isinstance(model.blocks[1].att.key, QuantizedLinear)


def test_trained_weights_are_float32_copies_and_frozen_ones_stay():
    weights = tiny_weights()
    model = tiny_model(weights).bfloat16()
    frozen = model.blocks[1].att.key.weight.detach()
    apply_layer_profile(model, profile("freeze", "full", "lora", "freeze"), seed=0)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.requires_grad)
    assert model.emb.weight.dtype == torch.bfloat16
    assert model.blocks[1].att.key.weight.data_ptr() == frozen.data_ptr()

    exact = tiny_model(weights)
    before = exact.blocks[0].ln1.weight.data
    apply_layer_profile(exact, profile("freeze", "full", "lora", "freeze"), seed=0)
    assert exact.blocks[0].ln1.weight.data_ptr() != before.data_ptr()


def test_a_trained_state_is_made_where_the_block_is():
    with torch.device("meta"):
        model = Tiny()
    apply_layer_profile(model, profile("freeze", "state", "freeze", "freeze"), seed=0)
    assert trained(model) == {"blocks.0.att.time_state"} and model.blocks[0].att.time_state.is_meta


def test_the_same_seed_gives_the_same_adapter_quantized_or_not():
    def adapter(seed: int, quantize: str | None = None) -> torch.Tensor:
        model = tiny_model(tiny_weights(), quantize, {0, 1} if quantize else set())
        apply_layer_profile(model, profile("freeze", "lora", "lora", "freeze"), seed)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(adapter(3), adapter(3)) and torch.equal(adapter(3), adapter(3, "int8"))
    assert not torch.equal(adapter(3), adapter(4))
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, profile("freeze", "lora", "lora", "freeze"), 3)
    assert not torch.equal(model.blocks[0].att.key.lora_A, model.blocks[1].att.key.lora_A)


def groups_by_name(model, settings) -> dict[str, tuple[float, float, float]]:
    groups = parameter_groups(model, settings)
    parameters = dict(model.named_parameters())
    for group in groups:
        assert all(parameters[name] is parameter for name, parameter in zip(group["names"], group["params"], strict=True))
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names)) and set(names) == trained(model)
    keys = [(group["lr_init"], group["lr_final"], group["weight_decay"]) for group in groups]
    assert len(keys) == len(set(keys))
    return {name: key for group, key in zip(groups, keys, strict=True) for name in group["names"]}


def test_weight_decay_reaches_the_large_matrices_alone():
    settings = profile("full", "full", "lora", "full", weight_decay=0.25)
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, settings, seed=0)
    found = groups_by_name(model, settings)
    linears = {f"blocks.0.{name}.weight" for name in LINEARS}
    decayed = {"emb.weight", "head.weight"} | linears | lora_names(*(f"blocks.1.{name}" for name in LINEARS))
    assert {name for name, key in found.items() if key[2] == 0.25} == decayed
    assert {name for name, key in found.items() if key[2] == 0} == trained(model) - decayed
    spared = {"blocks.0.att.w1", "blocks.0.att.r_k", "blocks.0.att.x_r", "blocks.0.ln0.weight", "ln_out.bias"}
    assert spared <= trained(model) - decayed


def test_each_layer_has_its_own_rates_and_like_ones_share_a_group():
    settings = profile("freeze", "lora", "lora", "full")
    settings = [settings[0], settings[1], settings[2], replace(settings[3], weight_lr_init=5.0, weight_lr_final=4.0)]
    model = tiny_model(tiny_weights())
    apply_layer_profile(model, settings, seed=0)
    found = groups_by_name(model, settings)
    assert {name: key for name, key in found.items() if name.startswith("blocks.")} == dict.fromkeys(
        lora_names(*(f"blocks.{layer}.{name}" for layer in (0, 1) for name in LINEARS)), (1e-2, 1e-3, 0.01))
    assert found["head.weight"] == (5.0, 4.0, 0.01) and found["ln_out.weight"] == (5.0, 4.0, 0.0)
    assert len(parameter_groups(model, settings)) == 3


def test_only_what_trains_gets_a_gradient_and_moves():
    settings = profile("freeze", "full", "lora", "freeze")
    model = tiny_model(tiny_weights(), "nf4", blocks_to_quantize(settings))
    apply_layer_profile(model, settings, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.SGD([{"params": group["params"], "lr": group["lr_init"]} for group in groups])
    for _ in range(2):  # lora_B is 0 at first, so that lora_A has a gradient from the second step on
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(TOKENS), TOKENS.flip(0)).backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained(model)
