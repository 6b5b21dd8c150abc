"""Make a model train as its layer profile says, and sort what trains into groups for the optimizer.

It knows of the model only the official names: `emb`, `blocks` with linear layers under `att` and `ffn`, `ln_out`, `head`.

What trains, less the parts that a layer rejects: mode `freeze`, nothing; mode `full`, every parameter of the layer, block 0's ln0
and head's ln_out among them; mode `lora`, a LoRA beside each linear weight of the layer (att.receptance, att.key, att.value,
att.output and v6's att.gate; ffn.key, ffn.value and v6's ffn.receptance; or head), while its vectors, low-rank matrices and norms
stay as they are.
"""

import torch
from torch import nn

from src.adapters.layer_profile import LayerSetting, layer_of
from src.adapters.linear import Linear
from src.adapters.lora import LoRALinear
from src.errors import UserError
from src.quantization.linear import QuantizedLinear


def blocks_to_quantize(settings: list[LayerSetting]) -> set[int]:
    """The blocks whose linear weights may be quantized; a block that trains in full needs them exact."""
    return {int(setting.layer) for setting in settings if setting.layer.isdigit() and setting.mode != "full"}


def apply_layer_profile(model: nn.Module, settings: list[LayerSetting], seed: int) -> None:
    """Wrap linear layers in LoRA where the profile says so and set `requires_grad` on every parameter; to be called once.

    A base weight that trains becomes a float32 copy, apart from the checkpoint's tensor, so that small steps are not rounded
    away; frozen weights stay as they are. The LoRA matrices depend on the profile and `seed` alone.

    Raises:
        UserError: a rejected part that no parameter has, a LoRA rank above a weight's smaller side, or nothing left to train.
        ValueError: a profile for another depth, or a quantized layer in mode full (see `blocks_to_quantize`).
    """
    n_layer = len(model.blocks)
    if [setting.layer for setting in settings] != ["emb", *map(str, range(n_layer)), "head"]:
        raise ValueError(f"the profile has rows for {len(settings) - 2} blocks, the model has {n_layer}")
    _check_reject_parts(model, settings)
    model.requires_grad_(False)
    by_layer = {setting.layer: setting for setting in settings}
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear | QuantizedLinear):
            continue
        layer, local_name = layer_of(f"{name}.weight")
        setting = by_layer[layer]
        if isinstance(module, QuantizedLinear) and setting.mode == "full":
            raise ValueError(f"{name} is quantized and cannot be trained in full")
        if setting.mode == "lora" and not setting.rejects(local_name):
            _check_rank(name, module, setting)
            model.set_submodule(name, LoRALinear(module, setting.rank, setting.alpha, setting.dropout, generator))

    for name, parameter in model.named_parameters():
        layer, local_name = layer_of(name)
        setting = by_layer[layer]
        if setting.mode == "full" and not setting.rejects(local_name):
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        elif name.endswith((".lora_A", ".lora_B")):
            parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("the layer profile leaves nothing to train; give at least one layer mode lora or full")


def parameter_groups(model: nn.Module, settings: list[LayerSetting]) -> list[dict]:
    """Groups for the optimizer: one for each set of layers and parameters that share rates and weight decay.

    Weight decay reaches the large matrices: linear weights, the embedding, the head, and LoRA's. Vectors, norms and the low-rank
    matrices of the official layout (x_*, time_*, w0 ... g2, k_k, k_a, r_k, ln*) have none.

    Returns:
        dicts of params, names (as in `model.named_parameters()`, which gives the order), lr_init, lr_final, weight_decay.
    """
    by_layer = {setting.layer: setting for setting in settings}
    matrices = {f"{name}.{leaf}" for name, module in model.named_modules() if isinstance(module, Linear | LoRALinear)
                for leaf, _ in module.named_parameters(recurse=False)} | {"emb.weight"}
    groups: dict[tuple[float, float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        setting = by_layer[layer_of(name)[0]]
        key = (setting.weight_lr_init, setting.weight_lr_final, setting.weight_decay if name in matrices else 0.0)
        empty = {"params": [], "names": [], "lr_init": key[0], "lr_final": key[1], "weight_decay": key[2]}
        group = groups.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _check_reject_parts(model: nn.Module, settings: list[LayerSetting]) -> None:
    """A part may miss in one layer (block 0 of v7 has no v0); one that is nowhere in the model is a slip of the pen."""
    quantized = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    names = {layer_of(name)[1] for name in [*quantized, *dict(model.named_parameters())]}
    for setting in settings:
        for part in setting.reject_parts:
            if setting.mode != "freeze" and not any(part in name for name in names):
                raise UserError(f"layer profile, layer {setting.layer}: RejectParts names {part!r}, "
                                f"which is in no parameter's name; write for example att.receptance, ffn.value or ln1")


def _check_rank(name: str, module: Linear | QuantizedLinear, setting: LayerSetting) -> None:
    side = min(module.in_features, module.out_features)
    if setting.rank > side:
        raise UserError(f"layer profile, layer {setting.layer}: rank {setting.rank} is above the smaller side of {name} "
                        f"({module.out_features} x {module.in_features}); choose one up to {side}")
