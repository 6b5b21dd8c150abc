"""Adapter files: the trained tensors as safetensors, and merging them into a checkpoint.

A file holds the trained tensors, under their official names (`blocks.0.ln1.weight`, ...) or, for the adapter of a linear
weight, as `blocks.0.att.key.lora_A` and so on, with the adapter's further tensors for merging. Its metadata are strings:
`adapter_format`, the base checkpoint's `base_fingerprint`, and in JSON the layer `profile` (with each layer's mode, rank and
alpha) and the caller's `extra`. Trained initial states are also written to a file of their own next to it, for runtimes.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.adapters.adapted import AdaptedLinear
from src.adapters.layer_profile import LayerSetting, all_layers, layer_of, setting_of
from src.adapters.modes import ADAPTERS
from src.adapters.state import states_in
from src.adapters.tensors import adapter_shapes, is_linear, shapes_of
from src.checked_json import BadJson, parse_json
from src.checkpoint.io import fingerprint, load_safetensors, not_finite, save_checkpoint, save_safetensors
from src.errors import NotFinite, UserError
from src.files import json_text

FORMAT = "1"
# The shapes of the JSON in the metadata.
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
        """The profile's row of the layer that a parameter belongs to; UserError if it has none."""
        layer = layer_of(name)[0]
        for setting in self.settings:
            if setting.layer == layer:
                return setting
        raise UserError(f"{self.path}: the layer profile in it has no row for layer {layer}; use an adapter of this base")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's adapter file, after `apply_layer_profile`: trained parameters, and those that adapters keep."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = {f"{name}.{leaf}": module.get_buffer(leaf) for name, module in model.named_modules()
            if isinstance(module, AdaptedLinear) for leaf in module.keeps}
    return trained | kept


def save_adapter(model: nn.Module, path: str | Path, settings: list[LayerSetting], base_fingerprint: str,
                 extra: dict[str, Any]) -> None:
    """Write the adapter file, in float32, whole or not at all, and before it the file of trained states if there are any.

    Args:
        settings: the profile that the model was made with (`apply_layer_profile`).
        extra: anything JSON can hold, such as the step and the arguments of the run.

    Raises:
        NotFinite: a tensor contains NaN or infinity. Nothing is written then, and an existing file stays.
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
    """Write the trained initial states among `weights` next to `path`, NAME.state.pth; returns None if there are none."""
    states = states_in(weights)
    if not states:
        return None
    save_checkpoint(states, states_path(path))
    return states_path(path)


def states_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".state.pth")


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file; its tensors are converted to float32.

    Raises:
        UserError: the file is missing, broken, no adapter, of another format version, or has a tensor of whole numbers.
        NotFinite: a tensor contains NaN or infinity.
    """
    weights, metadata = load_safetensors(path)
    version = metadata.get("adapter_format")
    if version is None:
        raise UserError(f"{path}: not an adapter file (its metadata have no adapter_format)")
    if version != FORMAT:
        raise UserError(f"{path}: adapter format {version[:20]}, but this program reads format {FORMAT}; use the version that "
                        "wrote it")
    try:
        rows = parse_json(metadata["profile"], _PROFILE)
        settings = [setting_of(row, len(rows) - 2, f"profile[{number}]") for number, row in enumerate(rows)]
        named = [setting.layer for setting in settings]
        unknown = {layer_of(name)[0] for name in weights} - set(named)
        if unknown or len(set(named)) < len(named):
            raise ValueError(f"no profile row for layer {min(unknown)[:60]}" if unknown else "two profile rows for one layer")
        if named != all_layers(len(named) - 2):
            raise ValueError("the profile's rows are not emb, 0, 1, ... head")
        if not re.fullmatch("[0-9a-f]{64}", metadata["base_fingerprint"]):
            raise ValueError(f"base_fingerprint {metadata['base_fingerprint'][:60]!r} is not a fingerprint")
        extra = parse_json(metadata["extra"], _EXTRA)
    except KeyError as error:
        raise UserError(f"{path}: the adapter's metadata are damaged (it lacks {error}); save it again") from error
    except (BadJson, UserError, ValueError) as error:
        raise UserError(f"{path}: the adapter's metadata are damaged ({error}); save it again") from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            held = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name[:100]} holds {held}, expected floating point; the file is damaged, use another copy")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    wrong = not_finite(weights)
    if wrong:
        raise NotFinite(f"{path}: {wrong} are not finite, as after diverged training; use an earlier adapter")
    return Adapter(path, weights, settings, metadata["base_fingerprint"], extra)


def check_adapter(adapter: Adapter, base_weights: Mapping[str, Tensor], base_fingerprint: str) -> None:
    """Check that an adapter belongs to a base, and has exactly the tensors that its own layer profile trains there.

    Raises:
        UserError: another base, a profile that does not fit it, a tensor that is missing, not in the profile or of another shape.
    """
    _check_base(adapter, base_fingerprint)
    expected = adapter_shapes(adapter.settings, shapes_of(base_weights), f"{adapter.path}: the layer profile in it")
    _check_tensors(adapter, expected, "its own layer profile", "the file is incomplete or damaged, use another copy")


def load_adapter(model: nn.Module, file: str | Path | Adapter, base_fingerprint: str | None = None) -> Adapter:
    """Put an adapter file's tensors into a model that `apply_layer_profile` prepared with the same profile.

    Args:
        file: its path, or its content.
        base_fingerprint: the fingerprint of the model's base; if given, checked against the file's.

    Returns:
        The file's content, for its `extra`.

    Raises:
        UserError: another base, another mode, a tensor that the model or the file lacks, another shape, or another alpha. The
            model is unchanged then.
    """
    adapter = file if isinstance(file, Adapter) else read_adapter(file)
    path = adapter.path
    if base_fingerprint is not None:
        _check_base(adapter, base_fingerprint)
    found = adapter_tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            theirs, ours = adapter.setting(f"{name}.weight").mode, _mode(module)
            if theirs != ours:
                raise UserError(f"{path}: {name} was trained in mode {theirs}, but the layer profile says {ours}; "
                                f"use the layer profile that the adapter was trained with")
    _check_tensors(adapter, shapes_of(found), "the model's layer profile", "use the one that the adapter was trained with")
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
    """The checkpoint equivalent to base and adapter, except for trained initial states, which no weight can express.

    Args:
        base_weights: the official-layout checkpoint that the adapter was trained on, all finite; not modified.
        file: the adapter's path, or its content.
        base_fingerprint: the base's, if it is known already.

    Returns:
        The base's names, shapes and dtypes, in its order. Tensors that the adapter changes are new, computed in float32; the
        others are the base's own.

    Raises:
        UserError: the adapter does not fit the base (`check_adapter`).
        NotFinite: a tensor of the adapter or of the merged checkpoint contains NaN or infinity.
    """
    adapter = file if isinstance(file, Adapter) else read_adapter(file)
    check_adapter(adapter, base_weights, base_fingerprint or fingerprint(base_weights))
    merged = dict(base_weights)
    for name, weight in base_weights.items():
        setting = adapter.setting(name)
        kind = setting.adapter(layer_of(name)[1]) if is_linear(name) else None
        if kind is not None:
            prefix, (out_features, in_features) = name.removesuffix("weight"), weight.shape
            leaves = kind.shapes(out_features, in_features, setting.rank)
            tensors = {leaf: adapter.weights[f"{prefix}{leaf}"] for leaf in leaves}
            merged[name] = kind.merge(weight, tensors, setting.alpha)
        elif name in adapter.weights:
            merged[name] = adapter.weights[name].to(weight.dtype)
    _check_merged(merged, base_weights, adapter.path)
    return merged


def _check_merged(merged: Mapping[str, Tensor], base_weights: Mapping[str, Tensor], path: str | Path) -> None:
    for name, tensor in merged.items():
        wrong = None if tensor is base_weights[name] else not_finite({name: tensor})
        if wrong:
            held = str(tensor.dtype).removeprefix("torch.")
            raise NotFinite(f"{path}: merged into the base, {wrong} are not finite in its {held}; use an earlier adapter")


def _mode(module: AdaptedLinear) -> str:
    return next(mode for mode, adapter in ADAPTERS.items() if adapter is type(module))


def _check_base(adapter: Adapter, base_fingerprint: str) -> None:
    if adapter.base_fingerprint != base_fingerprint:
        raise UserError(f"{adapter.path}: the adapter was trained on the base model {adapter.base_fingerprint}, "
                        f"but this base is {base_fingerprint}; give the checkpoint that it was trained on")


def _check_tensors(adapter: Adapter, expected: Mapping[str, tuple[int, ...]], whose: str, remedy: str) -> None:
    """Raise UserError for the first tensor that the file lacks, has in addition to `expected`, or has in another shape.

    Args:
        expected: name and shape of all tensors that it must have. whose: the profile that determines them.
    """
    for name in (*expected, *adapter.weights):
        if name not in adapter.weights:
            raise UserError(f"{adapter.path}: the file lacks {name[:100]}, which {whose} has; {remedy}")
        if name not in expected:
            raise UserError(f"{adapter.path}: the file has {name[:100]}, which {whose} lacks; {remedy}")
        found = tuple(adapter.weights[name].shape)
        if found != tuple(expected[name]):
            raise UserError(f"{adapter.path}: {name[:100]} has shape {found}, expected {tuple(expected[name])} by {whose}; "
                            f"{remedy}")
