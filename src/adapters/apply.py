"""Prepares a model to train by its layer profile, and sorts the trained parameters into groups for the optimizer.

Of the model it knows only the official names: `emb`, `blocks` with linear layers under `att` and `ffn`, `ln_out`, `head`.
tensors.py determines from them what trains.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.layer_profile import LayerSetting, layer_of
from src.adapters.linear import Linear
from src.adapters.state import LEAF, add_state
from src.adapters.tensors import Shapes, adapter_shapes, check_rank, is_linear
from src.quantization.linear import QuantizedLinear, quantize_linear


def blocks_to_quantize(settings: list[LayerSetting]) -> set[int]:
    """The blocks that may be quantized; a block in mode full needs its exact weights."""
    return {int(setting.layer) for setting in settings if setting.layer.isdigit() and setting.mode != "full"}


def how_quantized(settings: list[LayerSetting], names: Iterable[str], scheme: str | None) -> dict[str, Any]:
    """How a model that trains by this profile stores its linear weights, as a `.save`'s sidecar records it.

    Args:
        names: of the checkpoint's tensors. scheme: "nf4", "int8", or None for a plain model.
    """
    blocks = {int(setting.layer) for setting in settings if setting.layer.isdigit()}
    return {"quantization": scheme, "unquantized_blocks": sorted(blocks - blocks_to_quantize(settings)) if scheme else [],
            "quantized_otherwise": quantized_otherwise(settings, names) if scheme else {}}


def quantized_linears(settings: list[LayerSetting], scheme: str | None) -> Callable[[str, Tensor], nn.Module | None] | None:
    """How a model that trains by this profile makes its blocks' quantized linear layers; for `build_model`.

    Returns:
        a function of a linear layer's name and its weight [out, in]: the layer, or None if it has to stay plain, since it trains
        in full. None if `scheme` is None, and nothing is quantized.

    Raises (the function):
        UserError: a rank above the smaller side of a weight that its adapter splits.
    """
    if scheme is None:
        return None
    by_layer = {setting.layer: setting for setting in settings}

    def hold(name: str, weight: Tensor) -> nn.Module | None:
        layer, local_name = layer_of(f"{name}.weight")
        setting = by_layer[layer]
        adapter = setting.adapter(local_name)
        if setting.mode == "full" or setting.in_full(local_name):
            return None
        if adapter is None or not adapter.splits_base:
            return quantize_linear(weight, scheme)
        out_features, in_features = weight.shape
        check_rank(name, adapter, out_features, in_features, setting)
        return adapter.quantized(weight, scheme, setting.rank)

    return hold


def quantized_otherwise(settings: list[LayerSetting], names: Iterable[str]) -> dict[str, str]:
    """The linear weights of a quantized model that are not plainly quantized under this profile, except blocks in mode full.

    Args:
        names: of the checkpoint's tensors.

    Returns:
        name of the weight -> how: "full", or an adapter that splits it, with its rank ("pissa 16").
    """
    by_layer, found = {setting.layer: setting for setting in settings}, {}
    for name in sorted(names):
        layer, local_name = layer_of(name)
        setting = by_layer[layer]
        if not (layer.isdigit() and is_linear(name)) or setting.mode == "full":
            continue
        adapter = setting.adapter(local_name)
        if setting.in_full(local_name):
            found[name] = "full"
        elif adapter is not None and adapter.splits_base:
            found[name] = f"{setting.mode} {setting.rank}"
    return found


def apply_layer_profile(model: nn.Module, settings: list[LayerSetting], seed: int) -> None:
    """Add the adapters and set `requires_grad` on every parameter; call it once.

    A trained base weight becomes a float32 copy, separate from the checkpoint's tensor, so that small steps are not rounded
    away; frozen weights stay as they are. An adapter's random values depend only on the profile and `seed`.

    Raises:
        UserError: the profile does not fit the model, or leaves nothing to train (`adapter_shapes`).
        ValueError: a weight is not stored as this profile needs it (`quantized_linears`).
    """
    base = _base_shapes(model)
    trained = adapter_shapes(settings, base)
    model.requires_grad_(False)
    by_layer = {setting.layer: setting for setting in settings}
    generator = torch.Generator().manual_seed(seed)
    for name, module in _linears(model):
        layer, local_name = layer_of(f"{name}.weight")
        setting = by_layer[layer]
        if isinstance(module, QuantizedLinear) and setting.in_full(local_name):
            raise ValueError(f"{name} is quantized and cannot be trained in full")
        adapter = setting.adapter(local_name)
        if adapter is None:
            continue
        if isinstance(module, Linear | QuantizedLinear):
            module = adapter(module, setting.rank, setting.alpha, setting.dropout, generator)
            model.set_submodule(name, module)
        elif not isinstance(module, adapter):
            raise ValueError(f"{name} already has another adapter than {setting.mode}")
        for leaf in adapter.shapes(module.out_features, module.in_features, setting.rank).keys() - set(adapter.keeps):
            module.get_parameter(leaf).requires_grad_(True)
    for setting in settings:
        if f"blocks.{setting.layer}.att.{LEAF}" in trained:
            add_state(model.get_submodule(f"blocks.{setting.layer}"))
    for name in trained.keys() & base.keys():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(torch.float32, copy=True)
        parameter.requires_grad_(True)


def parameter_groups(model: nn.Module, settings: list[LayerSetting]) -> list[dict[str, Any]]:
    """Groups for the optimizer: one for each set of layers and parameters that share rates and weight decay.

    Weight decay applies to the large matrices: linear weights, the embedding, the head, and the adapters'. Vectors, norms, states
    and the low-rank matrices of the official layout (x_*, time_*, w0 ... g2, k_k, k_a, r_k, ln*) have none.

    Returns:
        dicts of params, names (as in `model.named_parameters()`, which gives the order), lr_init, lr_final, weight_decay.
    """
    by_layer = {setting.layer: setting for setting in settings}
    matrices = {f"{name}.{leaf}" for name, module in _linears(model)
                for leaf, parameter in module.named_parameters() if parameter.dim() == 2} | {"emb.weight"}
    groups: dict[tuple[float, float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, local_name = layer_of(name)
        setting = by_layer[layer]
        key = (*setting.rates(local_name), setting.weight_decay if name in matrices else 0.0)
        empty = {"params": [], "names": [], "lr_init": key[0], "lr_final": key[1], "weight_decay": key[2]}
        group = groups.setdefault(key, empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear | QuantizedLinear | AdaptedLinear]]:
    """Every linear layer once, by its official name; layers inside an adapter belong to the adapter."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear | QuantizedLinear | AdaptedLinear) and not name.endswith(".base"):
            yield name, module


def _base_shapes(model: nn.Module) -> Shapes:
    """Name and shape of the base's tensors in a model, for plain, quantized and adapted linear layers."""
    linears = {name: (module.out_features, module.in_features) for name, module in _linears(model)}
    others = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()
              if name.rpartition(".")[0] not in linears}
    return {f"{name}.weight": shape for name, shape in linears.items()} | others
