"""Determines version and dimensions from a checkpoint's own tensors, and which tensors such a model has."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError

# v7 checkpoints may have these, but no model reads them.
UNREAD = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


@dataclass(frozen=True)
class Dimensions:
    """Everything that the model's shape depends on; nothing in it comes from a flag."""

    version: str  # "x060" or "x070"
    n_layer: int
    n_embd: int
    vocab_size: int
    n_head: int
    head_size: int
    n_ffn: int
    ranks: tuple[tuple[str, int], ...]  # low-rank widths: v6 (mix, decay), v7 (w, a, v, g)
    dtype: torch.dtype  # of the stored weights

    def rank(self, name: str) -> int:
        return dict(self.ranks)[name]


def read_dimensions(weights: Mapping[str, Tensor], name: str) -> Dimensions:
    """Read the version and all dimensions of an official-layout RWKV checkpoint.

    Args:
        weights: parameter name -> tensor, as `load_checkpoint` returns it.
        name: the checkpoint's path, for messages.

    Raises:
        UserError: not RWKV at all, RWKV v4 or v5, a variant with further tensors (DeepEmbed),
            a layer or tensor missing, a shape that contradicts the others, or heads of width 1.
    """
    if "emb.weight" not in weights or not any(key.startswith("blocks.0.") for key in weights):
        raise UserError(f"{name}: not an RWKV checkpoint (no emb.weight and blocks.0.*)")
    if "blocks.0.att.r_k" in weights:
        version = "x070"
    elif "blocks.0.att.time_maa_w1" in weights:
        version = "x060"
    elif any(".att.time_" in key or ".att.ln_x." in key for key in weights):
        raise UserError(f"{name}: an RWKV checkpoint older than v6; only v6 (x060) and v7 (x070) are supported")
    else:
        raise UserError(f"{name}: not an RWKV v6 or v7 checkpoint (neither att.time_maa_w1 nor att.r_k in block 0)")
    if "blocks.0.ffn.s_emb.weight" in weights:
        raise UserError(f"{name}: an RWKV-7 variant with DeepEmbed (ffn.s_emb), which is not supported")

    layers = {int(number[1]) for key in weights if (number := re.match(r"blocks\.([0-9]{1,9})\.", key))}
    n_layer = len(layers)
    if layers != set(range(n_layer)):
        raise UserError(f"{name}: block {min(set(range(n_layer)) - layers)} is missing; the file is incomplete")
    vocab_size, n_embd = _shape(weights, "emb.weight", 2, name)
    head = "blocks.0.att.r_k" if version == "x070" else "blocks.0.att.time_faaaa"
    n_head, head_size = _shape(weights, head, 2, name)
    n_ffn, _ = _shape(weights, "blocks.0.ffn.key.weight", 2, name)
    if version == "x070":
        # Block 0 needs no value residual, and some releases omit its v0, v1, v2.
        value_rank = _shape(weights, "blocks.1.att.v1", 2, name)[1] if n_layer > 1 else 0
        ranks = {key: _shape(weights, f"blocks.0.att.{key}1", 2, name)[1] for key in "wag"} | {"v": value_rank}
    else:
        ranks = {"mix": _shape(weights, "blocks.0.att.time_maa_w2", 3, name)[1],
                 "decay": _shape(weights, "blocks.0.att.time_decay_w1", 2, name)[1]}
    dimensions = Dimensions(version, n_layer, n_embd, vocab_size, n_head, head_size, n_ffn,
                            tuple(sorted(ranks.items())), weights["emb.weight"].dtype)
    if n_head * head_size != n_embd:
        raise UserError(f"{name}: {head} has shape {n_head} x {head_size}, which does not make n_embd {n_embd}")
    if head_size == 1:
        raise UserError(f"{name}: {head} has shape {n_head} x 1, but heads of width 1, which their norm makes 0, are not "
                        "supported; pass a model as released")
    return dimensions


def _shape(weights: Mapping[str, Tensor], key: str, n_axes: int, name: str) -> tuple[int, ...]:
    if key not in weights:
        raise UserError(f"{name}: {key} is missing; the file is incomplete or of another architecture")
    if weights[key].dim() != n_axes:
        raise UserError(f"{name}: {key} has {weights[key].dim()} axes, expected {n_axes}")
    if weights[key].numel() == 0:
        raise UserError(f"{name}: {key} is empty")
    return tuple(weights[key].shape)


def expected_shapes(dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a model of these dimensions needs, as the official releases have them.

    C is n_embd, F n_ffn, H x N the heads, V the vocabulary. Source: the official implementations' parameters
    (`RWKV_Tmix_x060`, `RWKV_Tmix_x070` and their channel mixes in BlinkDL/RWKV-LM). Block 0 of v7 needs no v0, v1, v2.
    """
    c, f, v = dimensions.n_embd, dimensions.n_ffn, dimensions.vocab_size
    block_shapes = _block_shapes_x070 if dimensions.version == "x070" else _block_shapes_x060
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (v, c)}
    for layer in range(dimensions.n_layer):
        norms = ("ln0", "ln1", "ln2", "att.ln_x") if layer == 0 else ("ln1", "ln2", "att.ln_x")
        block: dict[str, tuple[int, ...]] = {f"{norm}.{part}": (c,) for norm in norms for part in ("weight", "bias")}
        block |= {f"att.{key}.weight": (c, c) for key in ("receptance", "key", "value", "output")}
        block |= {"ffn.key.weight": (f, c), "ffn.value.weight": (c, f)}
        block |= block_shapes(dimensions, layer)
        shapes |= {f"blocks.{layer}.{key}": shape for key, shape in block.items()}
    return shapes | {"ln_out.weight": (c,), "ln_out.bias": (c,), "head.weight": (v, c)}


def _block_shapes_x070(dimensions: Dimensions, layer: int) -> dict[str, tuple[int, ...]]:
    c = dimensions.n_embd
    shapes: dict[str, tuple[int, ...]] = {f"att.x_{key}": (1, 1, c) for key in "rwkvag"}
    for key in "wavg" if layer > 0 else "wag":
        rank = dimensions.rank(key)
        shapes |= {f"att.{key}1": (c, rank), f"att.{key}2": (rank, c)}
        if key != "g":
            shapes[f"att.{key}0"] = (1, 1, c)
    return shapes | {"att.k_k": (1, 1, c), "att.k_a": (1, 1, c), "att.r_k": (dimensions.n_head, dimensions.head_size),
                     "ffn.x_k": (1, 1, c)}


def _block_shapes_x060(dimensions: Dimensions, layer: int) -> dict[str, tuple[int, ...]]:
    c, mix, decay = dimensions.n_embd, dimensions.rank("mix"), dimensions.rank("decay")
    shapes: dict[str, tuple[int, ...]] = {f"att.time_maa_{key}": (1, 1, c) for key in "xwkvrg"}
    return shapes | {
        "att.time_maa_w1": (c, 5 * mix), "att.time_maa_w2": (5, mix, c),
        "att.time_decay": (1, 1, c), "att.time_decay_w1": (c, decay), "att.time_decay_w2": (decay, c),
        "att.time_faaaa": (dimensions.n_head, dimensions.head_size), "att.gate.weight": (c, c),
        "ffn.time_maa_k": (1, 1, c), "ffn.time_maa_r": (1, 1, c), "ffn.receptance.weight": (c, c),
    }


def check_weights(weights: Mapping[str, Tensor], dimensions: Dimensions, name: str) -> None:
    """Check that `weights` is a complete model of `dimensions` and nothing else.

    A vector may be [C] or [1, 1, C]. Block 0 of v7 may have v0, v1 and v2, which nothing reads. Any other
    tensor beyond `expected_shapes` would change what the model computes (a tuned state, say), so it is refused.

    Raises:
        UserError: the first tensor that is missing, of another shape, not floating point, or unknown; `name`
            is the checkpoint's path.
    """
    expected = expected_shapes(dimensions)
    for key, shape in expected.items():
        if key not in weights:
            raise UserError(f"{name}: {key} is missing; the file is incomplete or of another architecture")
        found = tuple(weights[key].shape)
        if found != shape and not (_is_vector(found) and _is_vector(shape) and found[-1] == shape[-1]):
            raise UserError(f"{name}: {key} has shape {_text(found)}, expected {_text(shape)} by the file's other tensors")
        if not weights[key].is_floating_point():
            raise UserError(f"{name}: {key} holds {weights[key].dtype}, expected floating point; pass a model as released")
    unread = UNREAD if dimensions.version == "x070" else ()
    for key in weights:
        if key not in expected and key not in unread:
            raise UserError(f"{name}: {key[:100]!r} belongs to no {dimensions.version} model; pass a model as released")


def _is_vector(shape: tuple[int, ...]) -> bool:
    return shape[:-1] in ((), (1, 1))


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape[:8]) + " x ..." * (len(shape) > 8) or "no axes"
