"""The recurrences of RWKV-6 and RWKV-7, one token at a time: the reference that every other form is tested against.

v6 (Finch, arXiv:2404.05892, eq. 16-19), state S[key, value]:
    y_t = r_t^T (S + (u * k_t) v_t^T),   S <- diag(w_t) S + k_t v_t^T
v7 (Goose, arXiv:2503.14456, eq. 16-18), state S[value, key]:
    S <- S diag(w_t) - (S kappa_t)(kappa_t * a_t)^T + v_t k_t^T,   y_t = S r_t

Computes in float64 for float64 inputs, else in float32. All sequences advance together, so with one token each
this is also the decoding step of generation.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from src.wkv.layout import sequence_bounds


def wkv6_naive(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
               cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed v6. r, log_w, k, v [T_total, H, N]; u [H, N]; state [S, H, N, N] -> y [T_total, H, N], state."""
    w = log_w.exp()
    y, at = [], []
    for positions, active in _steps(cu_seqlens):
        out, s = wkv6_token(r[positions], w[positions], k[positions], v[positions], u, state[active])
        state = s if len(active) == len(state) else state.index_copy(0, active.to(state.device), s)
        y.append(out)
        at.append(positions)
    return _in_order(y, at, r), state


def wkv7_naive(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor,
               cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed v7. r, log_w, k, v, kappa, a [T_total, H, N]; state [S, H, N, N] -> y [T_total, H, N], state."""
    w, removed = log_w.exp(), kappa * a
    y, at = [], []
    for positions, active in _steps(cu_seqlens):
        out, s = wkv7_token(r[positions], w[positions], k[positions], v[positions], kappa[positions], removed[positions],
                            state[active])
        state = s if len(active) == len(state) else state.index_copy(0, active.to(state.device), s)
        y.append(out)
        at.append(positions)
    return _in_order(y, at, r), state


def wkv6_token(r: Tensor, w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence: r, w (the decay), k, v [S, H, N]; u [H, N]; state [S, H, N, N] -> y [S, H, N], state."""
    kv = k.unsqueeze(-1) * v.unsqueeze(-2)
    y = (r.unsqueeze(-2) @ (state + u.unsqueeze(-1) * kv)).squeeze(-2)
    return y, w.unsqueeze(-1) * state + kv


def wkv7_token(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, removed: Tensor,
               state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each sequence: r, w (the decay), k, v, kappa, removed (kappa * a) [S, H, N]; else like `wkv6_token`."""
    s_kappa = state @ kappa.unsqueeze(-1)
    state = state * w.unsqueeze(-2) - s_kappa * removed.unsqueeze(-2) + v.unsqueeze(-1) * k.unsqueeze(-2)
    return (state @ r.unsqueeze(-1)).squeeze(-1), state


def _steps(cu_seqlens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each time step, the packed positions of the tokens at that step and the sequences they belong to."""
    starts, lengths = sequence_bounds(cu_seqlens)
    for t in range(int(lengths.max()) if len(lengths) else 0):
        active = (lengths > t).nonzero().squeeze(-1)
        yield starts[active] + t, active


def _in_order(rows: list[Tensor], positions: list[Tensor], like: Tensor) -> Tensor:
    """Put the rows of all steps back into packed order."""
    if len(rows) <= 1:
        return rows[0] if rows else torch.zeros_like(like)
    return torch.cat(rows)[torch.cat(positions).argsort().to(like.device)]
