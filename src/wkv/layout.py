"""The positions of packed sequences' tokens for the recurrence: by step, and by chunk."""

from typing import NamedTuple

import torch
from torch import Tensor


class ChunkLayout(NamedTuple):
    """Sequences cut into chunks, chunks ordered by step, longest sequence first within a step.

    In that order the sequences still running at step j are always the first `active[j]` ones, so the
    state advances by slicing, and only the end of each sequence's last chunk is padded.
    """

    positions: Tensor  # [n_chunks, L] int64, in the packed tokens; T_total where the chunk is padding
    inverse: Tensor  # [T_total] int64, position in the flattened [n_chunks * L]
    order: Tensor  # [S] int64, sequences from longest to shortest
    active: list[int]  # sequences that have a j-th chunk, for each step j


def sequence_bounds(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Starts [S] and lengths [S] (int64, on the CPU) of sequences packed end to end."""
    bounds = cu_seqlens.to("cpu", torch.int64)
    return bounds[:-1], bounds[1:] - bounds[:-1]


def chunk_layout(cu_seqlens: Tensor, chunk: int, device: torch.device) -> ChunkLayout:
    starts, lengths = sequence_bounds(cu_seqlens)
    order = torch.argsort(lengths, descending=True, stable=True)
    starts, lengths = starts[order], lengths[order]
    n_chunks = (lengths + chunk - 1) // chunk
    steps = torch.arange(int(n_chunks[0]) if len(n_chunks) else 0)
    running = n_chunks[None, :] > steps[:, None]
    step, sequence = running.nonzero(as_tuple=True)
    offset = step[:, None] * chunk + torch.arange(chunk)
    inside = offset < lengths[sequence][:, None]
    total = int(cu_seqlens[-1])
    positions = torch.where(inside, starts[sequence][:, None] + offset, total)
    inverse = torch.empty(total, dtype=torch.int64)
    inverse[positions[inside]] = torch.arange(positions.numel()).view_as(positions)[inside]
    return ChunkLayout(positions.to(device), inverse.to(device), order.to(device), running.sum(1).tolist())


def to_chunks(x: Tensor, layout: ChunkLayout) -> Tensor:
    """[T_total, H, N] -> [n_chunks, H, L, N], zeros where a chunk is padding."""
    padded = torch.cat((x, x.new_zeros(1, *x.shape[1:])))
    return padded[layout.positions].transpose(1, 2)


def from_chunks(x: Tensor, layout: ChunkLayout) -> Tensor:
    """[n_chunks, H, L, N] -> [T_total, H, N], the inverse of `to_chunks`."""
    return x.transpose(1, 2).flatten(0, 1)[layout.inverse]
