"""Tell v6 from v7, and every dimension, from a checkpoint's own tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from src.errors import UserError


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
            a layer or tensor missing, or a shape that contradicts the others.
    """
    if "emb.weight" not in weights or not any(key.startswith("blocks.0.") for key in weights):
        raise UserError(f"{name}: not an RWKV checkpoint (no emb.weight and blocks.0.*)")
    if "blocks.0.att.r_k" in weights:
        version = "x070"
    elif "blocks.0.att.time_maa_w1" in weights:
        version = "x060"
    elif any(".att.time_" in key or ".att.ln_x." in key for key in weights):
        raise UserError(f"{name}: an RWKV checkpoint older than v6; this toolkit serves v6 (x060) and v7 (x070)")
    else:
        raise UserError(f"{name}: not an RWKV v6 or v7 checkpoint (neither att.time_maa_w1 nor att.r_k in block 0)")
    if "blocks.0.ffn.s_emb.weight" in weights:
        raise UserError(f"{name}: an RWKV-7 variant with DeepEmbed (ffn.s_emb), which is not served")

    layers = {int(key.split(".")[1]) for key in weights if key.startswith("blocks.")}
    n_layer = len(layers)
    if layers != set(range(n_layer)):
        raise UserError(f"{name}: block {min(set(range(n_layer)) - layers)} is missing; the file is incomplete")
    vocab_size, n_embd = _shape(weights, "emb.weight", 2, name)
    head = "blocks.0.att.r_k" if version == "x070" else "blocks.0.att.time_faaaa"
    n_head, head_size = _shape(weights, head, 2, name)
    n_ffn, _ = _shape(weights, "blocks.0.ffn.key.weight", 2, name)
    if version == "x070":
        # Block 0 needs no value residual, and some releases leave its v0, v1, v2 out.
        value_rank = _shape(weights, "blocks.1.att.v1", 2, name)[1] if n_layer > 1 else 0
        ranks = {key: _shape(weights, f"blocks.0.att.{key}1", 2, name)[1] for key in "wag"} | {"v": value_rank}
    else:
        ranks = {"mix": _shape(weights, "blocks.0.att.time_maa_w2", 3, name)[1],
                 "decay": _shape(weights, "blocks.0.att.time_decay_w1", 2, name)[1]}
    dimensions = Dimensions(version, n_layer, n_embd, vocab_size, n_head, head_size, n_ffn,
                            tuple(sorted(ranks.items())), weights["emb.weight"].dtype)
    if n_head * head_size != n_embd:
        raise UserError(f"{name}: {head} has shape {n_head} x {head_size}, which does not make n_embd {n_embd}")
    return dimensions


def _shape(weights: Mapping[str, Tensor], key: str, n_axes: int, name: str) -> tuple[int, ...]:
    if key not in weights:
        raise UserError(f"{name}: {key} is missing; the file is incomplete or of another architecture")
    if weights[key].dim() != n_axes:
        raise UserError(f"{name}: {key} has {weights[key].dim()} axes, expected {n_axes}")
    return tuple(weights[key].shape)
