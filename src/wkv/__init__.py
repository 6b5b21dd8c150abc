"""The WKV recurrence of RWKV-6 and RWKV-7: one signature for both, every backend chosen here and nowhere else.

Inputs are [B, T, H, N], or [T_total, H, N] with `cu_seqlens`: sequences packed end to end, the state reset (or
taken from `state`) at each start. Everything is differentiable, the initial state included. Knows nothing of models.
"""

import torch
from torch import Tensor

from src.wkv import chunked, reference
from src.wkv.layout import sequence_bounds

BACKENDS = ("auto", "steps", "chunked")
# Below this many tokens a sequence, a chunk is mostly padding and the plain steps are faster.
SHORT = 8


def wkv6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
         cu_seqlens: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The RWKV-6 recurrence (arXiv:2404.05892, eq. 16-19).

    Args:
        r, k, v: [B, T, H, N], or packed [T_total, H, N], of any floating dtype.
        log_w: log of the decay, <= 0, same shape.
        u: bonus of the current token [H, N].
        state: initial state [B or S, H, N (key), N (value)]; zeros where None.
        cu_seqlens: int32 [S + 1], borders of the packed sequences, 0 first and T_total last; None with [B, T, H, N].
        backend: "steps" (the reference), "chunked", or "auto".

    Returns:
        y in r's shape and dtype, and the final state [B or S, H, N, N] in float32 (float64 for float64 inputs).
    """
    run = reference.wkv6_steps if _use_steps(r, cu_seqlens, backend) else chunked.wkv6_chunked
    return _packed(run, (r, log_w, k, v), (u,), state, cu_seqlens)


def wkv7(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor | None = None,
         cu_seqlens: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The RWKV-7 recurrence (arXiv:2503.14456, eq. 16-18).

    Args:
        r, k, v: [B, T, H, N], or packed [T_total, H, N], of any floating dtype.
        log_w: log of the decay, same shape; in [-0.61, 0], as RWKV-7 defines it, for the chunked form.
        kappa: removal key, of unit length over N. a: in-context learning rate in (0, 1). Same shape.
        state: initial state [B or S, H, N (value), N (key)]; zeros where None.
        cu_seqlens, backend, and what is returned: as for `wkv6`.
    """
    run = reference.wkv7_steps if _use_steps(r, cu_seqlens, backend) else chunked.wkv7_chunked
    return _packed(run, (r, log_w, k, v, kappa, a), (), state, cu_seqlens)


def _use_steps(r: Tensor, cu_seqlens: Tensor | None, backend: str) -> bool:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {BACKENDS}")
    if backend != "auto":
        return backend == "steps"
    lengths = [r.shape[1]] if cu_seqlens is None else sequence_bounds(cu_seqlens)[1].tolist()
    return max(lengths, default=0) <= SHORT


def _packed(run, by_token: tuple[Tensor, ...], by_head: tuple[Tensor, ...], state: Tensor | None,
            cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    r = by_token[0]
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    if cu_seqlens is None:
        batch, length = r.shape[:2]
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
        by_token = tuple(x.flatten(0, 1) for x in by_token)
    n_sequences, (n_head, head_size) = len(cu_seqlens) - 1, r.shape[-2:]
    if state is None:
        state = torch.zeros(n_sequences, n_head, head_size, head_size, dtype=compute, device=r.device)
    y, state = run(*(x.to(compute) for x in by_token), *(x.to(compute) for x in by_head), state.to(compute), cu_seqlens)
    return y.to(r.dtype).view(r.shape), state
