"""Adapter files: what training changed, as safetensors, and how it goes back into a checkpoint.

A file holds the trained tensors alone, under their official names (`blocks.0.ln1.weight`, ...) and, for LoRA, as
`blocks.0.att.key.lora_A` and `.lora_B`. Its metadata are strings: `adapter_format`, the base checkpoint's `base_fingerprint`,
and in JSON the layer `profile` (which has each layer's alpha) and whatever the caller adds as `extra`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from src.adapters.layer_profile import LayerSetting, layer_of
from src.adapters.lora import LoRALinear, merge
from src.checkpoint.io import fingerprint, load_safetensors, save_safetensors
from src.errors import UserError

FORMAT = "1"


@dataclass(frozen=True)
class Adapter:
    """The content of an adapter file."""

    weights: dict[str, Tensor]
    settings: list[LayerSetting]
    base_fingerprint: str
    extra: dict[str, Any]

    def alpha(self, name: str) -> float:
        """The LoRA alpha of the layer that a parameter belongs to."""
        layer = layer_of(name)[0]
        return next(setting.alpha for setting in self.settings if setting.layer == layer)


def save_adapter(model: nn.Module, path: str | Path, settings: list[LayerSetting], base_fingerprint: str,
                 extra: dict[str, Any]) -> None:
    """Write the parameters that train, in float32, whole or not at all.

    Args:
        settings: the profile that the model was made with (`apply_layer_profile`).
        extra: anything JSON can hold, such as the step and the arguments of the run.
    """
    weights = {name: parameter.detach().to("cpu", torch.float32).contiguous() for name, parameter in _trained(model).items()}
    metadata = {"adapter_format": FORMAT, "base_fingerprint": base_fingerprint,
                "profile": json.dumps([asdict(setting) for setting in settings]), "extra": json.dumps(extra)}
    save_safetensors(weights, path, metadata)


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter file.

    Raises:
        UserError: the file is missing, broken, no adapter, or of another format version.
    """
    weights, metadata = load_safetensors(path)
    version = metadata.get("adapter_format")
    if version is None:
        raise UserError(f"{path}: not an adapter file (its metadata have no adapter_format)")
    if version != FORMAT:
        raise UserError(f"{path}: adapter format {version}, but this program reads format {FORMAT}; use the one that wrote it")
    try:
        rows = json.loads(metadata["profile"])
        settings = [LayerSetting(**row | {"reject_parts": tuple(row["reject_parts"])}) for row in rows]
        unknown = {layer_of(name)[0] for name in weights} - {setting.layer for setting in settings}
        if unknown:
            raise ValueError(f"no profile row for layer {min(unknown)}")
        return Adapter(weights, settings, metadata["base_fingerprint"], json.loads(metadata["extra"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the adapter's metadata are damaged ({error}); save it anew") from error


def load_adapter(model: nn.Module, path: str | Path, base_fingerprint: str | None = None) -> Adapter:
    """Put an adapter file's tensors into a model that `apply_layer_profile` prepared with the same profile.

    Args:
        base_fingerprint: the fingerprint of the model's base; checked against the file's where given.

    Returns:
        What the file held, for its `extra`.

    Raises:
        UserError: another base, a tensor that the model or the file lacks, another shape, or another LoRA alpha. The model is
            unchanged then.
    """
    adapter = read_adapter(path)
    if base_fingerprint is not None:
        _check_base(adapter, base_fingerprint, path)
    trained = _trained(model)
    for name in sorted(trained.keys() ^ adapter.weights.keys()):
        holder, other = ("the model trains", "the file") if name in trained else ("the file has", "the model's layer profile")
        raise UserError(f"{path}: {holder} {name}, which {other} lacks; use the layer profile that the adapter was trained with")
    for name, parameter in trained.items():
        _check_shape(name, adapter.weights[name].shape, parameter.shape, path)
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and module.alpha != adapter.alpha(f"{name}.lora_A"):
            raise UserError(f"{path}: {name} was trained with LoRA alpha {adapter.alpha(f'{name}.lora_A')}, "
                            f"but the layer profile says {module.alpha}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapter.weights[name])
    return adapter


def merge_adapter(base_weights: Mapping[str, Tensor], adapter_path: str | Path) -> dict[str, Tensor]:
    """The checkpoint that acts as base and adapter together.

    Args:
        base_weights: the official-layout checkpoint that the adapter was trained on; it is left as it is.

    Returns:
        The base's names, shapes and dtypes, in its order; only what the adapter changes is new, computed in float32. The other
        tensors are the base's own.

    Raises:
        UserError: another base, or an adapter tensor that finds no place in it.
    """
    adapter = read_adapter(adapter_path)
    _check_base(adapter, fingerprint(base_weights), adapter_path)
    merged = dict(base_weights)
    for name, trained in adapter.weights.items():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "lora_B" and f"{prefix}.lora_A" in adapter.weights:
            continue
        target = f"{prefix}.weight" if leaf in ("lora_A", "lora_B") else name
        if target not in base_weights:
            raise UserError(f"{adapter_path}: the adapter has {name}, but the base has no {target}")
        weight = base_weights[target]
        if leaf in ("lora_A", "lora_B"):
            merged[target] = _merge_lora(weight, prefix, adapter, adapter_path)
        else:
            _check_shape(name, trained.shape, weight.shape, adapter_path)
            merged[target] = trained.to(weight.dtype)
    return merged


def _merge_lora(weight: Tensor, prefix: str, adapter: Adapter, path: str | Path) -> Tensor:
    lora_A, lora_B = (adapter.weights.get(f"{prefix}.{leaf}") for leaf in ("lora_A", "lora_B"))
    if lora_A is None or lora_B is None:
        raise UserError(f"{path}: {prefix} has only one of lora_A and lora_B; the file is incomplete")
    if weight.dim() != 2 or lora_A.dim() != 2 or len(lora_A) == 0:
        raise UserError(f"{path}: {prefix}.lora_A is no matrix that fits {prefix}.weight of shape {tuple(weight.shape)}")
    rank = lora_A.shape[0]
    _check_shape(f"{prefix}.lora_A", lora_A.shape, (rank, weight.shape[1]), path)
    _check_shape(f"{prefix}.lora_B", lora_B.shape, (weight.shape[0], rank), path)
    return merge(weight, lora_A, lora_B, adapter.alpha(f"{prefix}.lora_A"))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _check_base(adapter: Adapter, base_fingerprint: str, path: str | Path) -> None:
    if adapter.base_fingerprint != base_fingerprint:
        raise UserError(f"{path}: the adapter was trained on the base model {adapter.base_fingerprint}, "
                        f"but this base is {base_fingerprint}; give the checkpoint that it was trained on")


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], path: str | Path) -> None:
    if tuple(found) != tuple(expected):
        raise UserError(f"{path}: {name} has shape {tuple(found)}, expected {tuple(expected)}")
