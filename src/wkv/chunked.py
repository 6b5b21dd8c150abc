"""The recurrences in chunks: most of the work is matrix products over all chunks at once, with the state carried between them.

Within a chunk every decay is a difference of cumulative log-decays, so no intermediate value underflows.
With A_t the sum of log w up to and including t, and S the state at the chunk's start:

v6:  y_t = (r_t e^{A_{t-1}}) S + sum_{s<t} (r_t e^{A_{t-1}-A_s} k_s) v_s + (r_t u k_t) v_t.
     log w has no lower bound, so the pairwise decays are formed explicitly ([L, L, N] for each chunk), never split
     into e^{A} e^{-A}, which would overflow.
v7:  let z = -kappa, b = kappa * a, u_t = S_{t-1} z_t. Then S_t = S e^{A_t} + sum_{s<=t} (u_s b_s^T + v_s k_s^T) e^{A_t-A_s},
     and the u_t solve a unit lower triangular system (the WY form of products of Householder-like matrices;
     arXiv:2503.14456, appendix; arXiv:2406.06484, section 3). log w >= -e^{-1/2} by the model's definition, so over
     32 tokens, measured from the chunk's middle, e^{+-A} stays within e^{+-9.8} and may be split.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from src.wkv.layout import ChunkLayout, chunk_layout, from_chunks, to_chunks

CHUNK_V6 = 16
CHUNK_V7 = 32
# e^-30 of a state is below float32's rounding of anything added to it; the bound avoids -inf - -inf in the differences.
SMALLEST_LOG_W = -30.0
# Bounds the pairwise decays that are formed at a time, so v6's extra memory does not depend on the length.
V6_SLICE_ELEMENTS = 1 << 23


def wkv6_chunked(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
                 cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed v6; shapes as in `reference.wkv6_naive`."""
    layout = chunk_layout(cu_seqlens, CHUNK_V6, r.device)
    r, log_w, k, v = (to_chunks(x, layout) for x in (r, log_w.clamp(min=SMALLEST_LOG_W), k, v))
    # Sums reach hundreds while the relevant differences are small; float64 keeps these at float32's precision.
    # Converted once, since the gradients of its two uses cancel where a decay is strong.
    log_w = log_w.double()
    total = log_w.cumsum(-2)
    before = total - log_w
    scores = _DecayedScores.apply(r, k, before, total)
    scores = scores + torch.diag_embed((r * k * u.unsqueeze(-2)).sum(-1))
    last = total[..., -1:, :]
    added = (k * (last - total).exp().to(k.dtype)).transpose(-1, -2) @ v
    decay = last.exp().to(k.dtype).transpose(-1, -2)

    starts, state = _carry(state, layout, lambda s, c: decay[c] * s + added[c])
    y = scores @ v + (r * before.exp().to(r.dtype)) @ starts
    return from_chunks(y, layout), state


class _DecayedScores(torch.autograd.Function):
    """scores[t, s] = sum_n r_t k_s e^{before_t - total_s} for s < t, 0 elsewhere; [.., L, N] x 4 -> [.., L, L].

    The pairwise decays are formed slice by slice, and again in the backward, so they are never kept.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, k: Tensor, before: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(r, k, before, total)
        shape = r.shape
        flat = [x.flatten(0, 1) for x in (r, k, before, total)]
        scores = [((_pairwise_decay(b, t, r.dtype) * k_.unsqueeze(1)) @ r_.unsqueeze(-1)).squeeze(-1)
                  for r_, k_, b, t in zip(*(x.split(_slice(x)) for x in flat), strict=True)]
        return torch.cat(scores).view(*shape[:-1], shape[-2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        r, k, before, total = ctx.saved_tensors
        flat = [x.flatten(0, 1) for x in (r, k, before, total)]
        size = _slice(flat[0])
        d_r, d_k, d_before, d_total = [], [], [], []
        for r_, k_, b, t, g in zip(*(x.split(size) for x in (*flat, gradient.flatten(0, 1))), strict=True):
            decay = _pairwise_decay(b, t, r.dtype) * g.unsqueeze(-1)
            # Neighbours have no decay between them: before_t and total_{t-1} are the same number. Its two gradients would
            # cancel only up to rounding, and where all decays are strong log w's gradient would be nothing but that rounding.
            neighbour = decay.diagonal(-1, 1, 2).transpose(1, 2).clone()
            decay.diagonal(-1, 1, 2).zero_()
            from_r, from_k = (decay * k_.unsqueeze(1)).sum(2), (decay * r_.unsqueeze(2)).sum(1)
            d_before.append(r_ * from_r)
            d_total.append(-k_ * from_k)
            from_r[:, 1:] += neighbour * k_[:, :-1]
            from_k[:, :-1] += neighbour * r_[:, 1:]
            d_r.append(from_r)
            d_k.append(from_k)
        return tuple(torch.cat(parts).view_as(x).to(x.dtype)
                     for parts, x in zip((d_r, d_k, d_before, d_total), ctx.saved_tensors, strict=True))


def _slice(x: Tensor) -> int:
    return max(1, V6_SLICE_ELEMENTS // (x.shape[-2] * x.shape[-2] * x.shape[-1]))


def _pairwise_decay(before: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """e^{before_t - total_s} for s < t, else 0: [m, L, N] x 2 -> [m, L, L, N]."""
    length = before.shape[-2]
    difference = (before.unsqueeze(2) - total.unsqueeze(1)).to(dtype)
    future = torch.ones(length, length, dtype=torch.bool, device=before.device).triu()
    return difference.masked_fill_(future.unsqueeze(-1), float("-inf")).exp_()


def wkv7_chunked(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor,
                 cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed v7; shapes as in `reference.wkv7_naive`; log_w >= -0.61 (see above)."""
    layout = chunk_layout(cu_seqlens, CHUNK_V7, r.device)
    r, log_w, k, v, z, b = (to_chunks(x, layout) for x in (r, log_w, k, v, -kappa, kappa * a))
    length = r.shape[-2]
    total = log_w.cumsum(-2)
    middle = total[..., length // 2 - 1:length // 2, :]
    grown, shrunk = (total - middle).exp(), (middle - total).exp()
    queries = torch.cat((z * (total - log_w - middle).exp(), r * grown), dim=-2)
    keys = torch.cat((b * shrunk, k * shrunk), dim=-2)
    # Both halves in one product: rows z then r, columns b then k; z sees strictly earlier tokens, r its own too.
    causal = torch.ones(length, length, dtype=torch.bool, device=r.device).tril()
    visible = torch.cat((causal.tril(-1), causal)).repeat(1, 2)
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(~visible, 0.0)
    (z_b, z_k), (r_b, r_k) = (half.split(length, dim=-1) for half in scores.split(length, dim=-2))
    z, r = queries.split(length, dim=-2)

    # u = u_own + u_state S^T with S the state at the chunk's start, decayed to the middle.
    right = torch.cat((z_k @ v, z), dim=-1)
    unit = torch.eye(length, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(unit - z_b, right, upper=False, unitriangular=True)
    u_own, u_state = solved.split(v.shape[-1], dim=-1)
    added = torch.cat((u_own, v), dim=-2).transpose(-1, -2) @ keys
    turned = u_state.transpose(-1, -2) @ keys[..., :length, :]
    to_middle, from_middle = middle.exp(), (total[..., -1:, :] - middle).exp()

    def advance(s: Tensor, c: slice) -> Tensor:
        s = s * to_middle[c]
        return (s + s @ turned[c] + added[c]) * from_middle[c]

    starts, state = _carry(state, layout, advance)
    y = r_k @ v + r_b @ u_own + (r + r_b @ u_state) @ (starts * to_middle).transpose(-1, -2)
    return from_chunks(y, layout), state


def _carry(state: Tensor, layout: ChunkLayout, advance: Callable[[Tensor, slice], Tensor]) -> tuple[Tensor, Tensor]:
    """Carry the state through all chunks: state [S, H, N, N] -> its value before each chunk [n_chunks, H, N, N], and after all.

    `advance(s, c)` advances the states `s` of the chunks in slice `c` to their ends.
    """
    running, finished, starts, at = state[layout.order], [], [], 0
    for count in layout.active:
        if count < len(running):
            running, done = running[:count], running[count:]
            finished.append(done)
        starts.append(running)
        running = advance(running, slice(at, at + count))
        at += count
    finished.append(running)
    final = torch.cat(finished[::-1])
    return torch.cat(starts) if starts else state[:0], final[torch.argsort(layout.order)]
