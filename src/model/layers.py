"""What RWKV-6 and RWKV-7 share: packed token shift, norms, and parameters seen at the activations' precision."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packing(NamedTuple):
    """Borders of sequences packed end to end in [T_total, ...]; empty sequences keep their state."""

    cu_seqlens: Tensor  # int32 [S + 1], on the CPU
    rows: Tensor  # int64, the sequences that have a token
    first: Tensor  # int64, where each of them starts
    last: Tensor  # int64, its last token


def read_packing(cu_seqlens: Tensor, device: torch.device) -> Packing:
    bounds = cu_seqlens.to("cpu", torch.int64)
    rows = (bounds[1:] > bounds[:-1]).nonzero().squeeze(-1)
    return Packing(cu_seqlens, rows.to(device), bounds[:-1][rows].to(device), (bounds[1:][rows] - 1).to(device))


def token_shift(x: Tensor, before: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Each token's predecessor in its own sequence, and what the next call needs.

    x [T_total, D], before [S, D] (the token before each sequence's first) -> previous [T_total, D], last tokens [S, D].
    """
    previous = torch.cat((x[:1], x[:-1])).index_copy(0, packing.first, before[packing.rows])
    return previous, before.index_copy(0, packing.rows, x[packing.last])


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A vector or low-rank matrix at x's precision; official vectors are stored as [1, 1, D].

    Frozen parameters already have it; trained ones are kept in float32 so that small steps are not rounded away.
    """
    return (parameter.flatten() if parameter.dim() == 3 else parameter).to(x.dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """x [T_total, D] -> its layer norm in `dtype`, computed at x's precision."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).to(dtype)


def head_norm(y: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalize each head on its own: y [T_total, H, N] -> [T_total, H * N]."""
    return F.group_norm(y.flatten(1), norm.num_groups, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)


def vector(n_embd: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, n_embd))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
