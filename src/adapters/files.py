"""Adapter files: what training changed, as safetensors, and how it goes back into a checkpoint.

A file holds the trained tensors, under their official names (`blocks.0.ln1.weight`, ...) or, for an adapter beside a linear
weight, as `blocks.0.att.key.lora_A` and so on, and what else merging needs of that adapter. Its metadata are strings:
`adapter_format`, the base checkpoint's `base_fingerprint`, and in JSON the layer `profile` (which has each layer's mode, rank and
alpha) and whatever the caller adds as `extra`. Trained initial states stand in a file of their own beside it, too, for runtimes.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.layer_profile import LayerSetting, layer_of, setting_of
from src.adapters.modes import ADAPTERS
from src.adapters.state import states_in
from src.checked_json import BadJson, parse_json
from src.checkpoint.io import fingerprint, load_safetensors, not_finite, save_checkpoint, save_safetensors
from src.errors import NotFinite, UserError
from src.files import json_text

FORMAT = "1"
# What stands in the metadata as JSON.
_PROFILE = [{"layer": str, "mode": str, "rank?": int, "alpha?": float, "dropout?": float, "weight_lr_init?": float,
             "weight_lr_final?": float, "weight_decay?": float, "state_lr_init?": float, "state_lr_final?": float,
             "reject_parts?": [str], "full_parts?": [str]}]
_EXTRA = {str: object}


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter file."""

    path: str | Path
    weights: dict[str, Tensor]
    settings: list[LayerSetting]
    base_fingerprint: str
    extra: dict[str, Any]

    def setting(self, name: str) -> LayerSetting:
        """The profile's row of the layer that a parameter belongs to."""
        layer = layer_of(name)[0]
        return next(setting for setting in self.settings if setting.layer == layer)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a model that `apply_layer_profile` prepared: the parameters that train, and what adapters keep."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {f"{name}.{leaf}": module.get_buffer(leaf) for name, module in model.named_modules()
            if isinstance(module, AdaptedLinear) for leaf in module.keeps}
    return trained | kept


def save_adapter(model: nn.Module, path: str | Path, settings: list[LayerSetting], base_fingerprint: str,
                 extra: dict[str, Any]) -> None:
    """Write the adapter file, in float32, whole or not at all, and before it the states' own file where there are any.

    Args:
        settings: the profile that the model was made with (`apply_layer_profile`).
        extra: anything JSON can hold, such as the step and the arguments of the run.

    Raises:
        NotFinite: a tensor has NaN or infinity in it. Nothing is written then, and a file that stood there stays.
    """
    weights = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in adapter_tensors(model).items()}
    wrong = not_finite(weights)
    if wrong:
        raise NotFinite(f"{path}: not written, since {wrong} of the adapter are not finite")
    metadata = {"adapter_format": FORMAT, "base_fingerprint": base_fingerprint,
                "profile": json_text([asdict(setting) for setting in settings], path), "extra": json_text(extra, path)}
    save_states(weights, path)
    save_safetensors(weights, path, metadata)


def save_states(weights: Mapping[str, Tensor], path: str | Path) -> Path | None:
    """Write the trained initial states among `weights` beside `path`, NAME.state.pth; returns None where there are none."""
    states = states_in(weights)
    if not states:
        return None
    save_checkpoint(states, states_path(path))
    return states_path(path)


def states_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".state.pth")


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file.

    Raises:
        UserError: the file is missing, broken, no adapter, or of another format version.
        NotFinite: a tensor has NaN or infinity in it.
    """
    weights, metadata = load_safetensors(path)
    version = metadata.get("adapter_format")
    if version is None:
        raise UserError(f"{path}: not an adapter file (its metadata have no adapter_format)")
    if version != FORMAT:
        raise UserError(f"{path}: adapter format {version[:20]}, but this program reads format {FORMAT}; use that which wrote it")
    try:
        rows = parse_json(metadata["profile"], _PROFILE)
        settings = [setting_of(row, len(rows) - 2, f"profile[{number}]") for number, row in enumerate(rows)]
        named = [setting.layer for setting in settings]
        unknown = {layer_of(name)[0] for name in weights} - set(named)
        if unknown or len(set(named)) < len(named):
            raise ValueError(f"no profile row for layer {min(unknown)[:60]}" if unknown else "two profile rows for one layer")
        if not re.fullmatch("[0-9a-f]{64}", metadata["base_fingerprint"]):
            raise ValueError(f"base_fingerprint {metadata['base_fingerprint'][:60]!r} is none")
        adapter = Adapter(path, weights, settings, metadata["base_fingerprint"], parse_json(metadata["extra"], _EXTRA))
    except KeyError as error:
        raise UserError(f"{path}: the adapter's metadata are damaged (it lacks {error}); save it anew") from error
    except (BadJson, UserError, ValueError) as error:
        raise UserError(f"{path}: the adapter's metadata are damaged ({error}); save it anew") from error
    wrong = not_finite(weights)
    if wrong:
        raise NotFinite(f"{path}: {wrong} are not finite, as after a training that diverged; use an earlier adapter")
    return adapter


def load_adapter(model: nn.Module, file: str | Path | Adapter, base_fingerprint: str | None = None) -> Adapter:
    """Put an adapter file's tensors into a model that `apply_layer_profile` prepared with the same profile.

    Args:
        file: where it is, or what was read of it.
        base_fingerprint: the fingerprint of the model's base; checked against the file's where given.

    Returns:
        What the file held, for its `extra`.

    Raises:
        UserError: another base, another mode, a tensor that the model or the file lacks, another shape, or another alpha. The
            model is unchanged then.
    """
    adapter = file if isinstance(file, Adapter) else read_adapter(file)
    path = adapter.path
    if base_fingerprint is not None:
        _check_base(adapter, base_fingerprint, path)
    found = adapter_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            theirs, ours = adapter.setting(f"{name}.weight").mode, _mode(module)
            if theirs != ours:
                raise UserError(f"{path}: {name} was trained in mode {theirs}, but the layer profile says {ours}; "
                                f"use the layer profile that the adapter was trained with")
    for name in sorted(found.keys() ^ adapter.weights.keys()):
        holder, other = ("the model trains", "the file") if name in found else ("the file has", "the model's layer profile")
        raise UserError(f"{path}: {holder} {name[:100]}, which {other} lacks; use the layer profile that the adapter was "
                        "trained with")
    for name, tensor in found.items():
        _check_shape(name, adapter.weights[name].shape, tensor.shape, path)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and "Alpha" in module.needs:
            alpha = adapter.setting(f"{name}.weight").alpha
            if module.alpha != alpha:
                raise UserError(f"{path}: {name} was trained with alpha {alpha}, but the layer profile says {module.alpha}")
    with torch.no_grad():
        for name, tensor in found.items():
            tensor.copy_(adapter.weights[name])
    return adapter


def merge_adapter(base_weights: Mapping[str, Tensor], file: str | Path | Adapter,
                  base_fingerprint: str | None = None) -> dict[str, Tensor]:
    """The checkpoint that acts as base and adapter together, but for trained initial states, which no weight can express.

    Args:
        base_weights: the official-layout checkpoint that the adapter was trained on, all finite; it is left as it is.
        file: where the adapter is, or what was read of it.
        base_fingerprint: the base's, where it is known already.

    Returns:
        The base's names, shapes and dtypes, in its order; only what the adapter changes is new, computed in float32. The other
        tensors are the base's own.

    Raises:
        UserError: another base, or an adapter tensor that finds no place in it.
        NotFinite: a tensor of the adapter, or of both together, has NaN or infinity in it.
    """
    adapter = file if isinstance(file, Adapter) else read_adapter(file)
    path = adapter.path
    _check_base(adapter, base_fingerprint or fingerprint(base_weights), path)
    merged = dict(base_weights)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, trained in adapter.weights.items():
        if states_in({name: trained}):
            continue
        prefix, _, leaf = name.rpartition(".")
        kind = ADAPTERS.get(adapter.setting(name).mode)
        beside = kind is not None and leaf in kind.shapes(1, 1, 1)
        target = f"{prefix}.weight" if beside else name
        if target not in base_weights:
            raise UserError(f"{path}: the adapter has {name[:100]}, but the base has no {target[:100]}")
        if beside:
            parts.setdefault(prefix, {})[leaf] = trained
        else:
            _check_shape(name, trained.shape, base_weights[target].shape, path)
            merged[target] = trained.to(base_weights[target].dtype)
    for prefix, tensors in parts.items():
        target = f"{prefix}.weight"
        merged[target] = _merge_one(base_weights[target], prefix, tensors, adapter.setting(target), path)
    _check_merged(merged, base_weights, path)
    return merged


def _check_merged(merged: Mapping[str, Tensor], base_weights: Mapping[str, Tensor], path: str | Path) -> None:
    for name, tensor in merged.items():
        wrong = None if tensor is base_weights[name] else not_finite({name: tensor})
        if wrong:
            held = str(tensor.dtype).removeprefix("torch.")
            raise NotFinite(f"{path}: merged into the base, {wrong} are not finite in its {held}; use an earlier adapter")


def _merge_one(weight: Tensor, prefix: str, tensors: dict[str, Tensor], setting: LayerSetting, path: str | Path) -> Tensor:
    kind = ADAPTERS[setting.mode]
    if weight.dim() != 2 or setting.rank < 1:
        raise UserError(f"{path}: a {setting.mode} of rank {setting.rank} does not fit {prefix}.weight of shape "
                        f"{tuple(weight.shape)}; the file is damaged")
    shapes = kind.shapes(*weight.shape, setting.rank)
    missing = shapes.keys() - tensors.keys()
    if missing:
        raise UserError(f"{path}: {prefix} lacks {' and '.join(sorted(missing))}; the file is incomplete")
    for leaf, shape in shapes.items():
        _check_shape(f"{prefix}.{leaf}", tensors[leaf].shape, shape, path)
    return kind.merge(weight, tensors, setting.alpha)


def _mode(module: AdaptedLinear) -> str:
    return next(mode for mode, adapter in ADAPTERS.items() if adapter is type(module))


def _check_base(adapter: Adapter, base_fingerprint: str, path: str | Path) -> None:
    if adapter.base_fingerprint != base_fingerprint:
        raise UserError(f"{path}: the adapter was trained on the base model {adapter.base_fingerprint}, "
                        f"but this base is {base_fingerprint}; give the checkpoint that it was trained on")


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], path: str | Path) -> None:
    if tuple(found) != tuple(expected):
        raise UserError(f"{path}: {name[:100]} has shape {tuple(found)}, expected {tuple(expected)}")
