"""The WKV recurrence of RWKV-6 and RWKV-7: one signature for both, and the only place that chooses a backend.

Inputs are [B, T, H, N], or [T_total, H, N] with `cu_seqlens`: sequences packed end to end, the state reset (or
taken from `state`) at each start. Everything is differentiable, including the initial state. Knows nothing about models.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from src.wkv import chunked, native, reference
from src.wkv.layout import sequence_bounds

BACKENDS = ("auto", "native", "chunked", "naive")
# Below this many tokens a sequence, a chunk is mostly padding and the plain recurrence is faster.
SHORT = 8
# Index of the tokens' log decay among the inputs.
LOG_W = 1

# (*by_token, *by_head, state, cu_seqlens) -> y, state.
Form = Callable[..., tuple[Tensor, Tensor]]


def wkv6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor | None = None,
         cu_seqlens: Tensor | None = None, backend: str = "auto", bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The RWKV-6 recurrence (arXiv:2404.05892, eq. 16-19).

    Args:
        r, k, v: [B, T, H, N], or packed [T_total, H, N], of any floating dtype.
        log_w: log of the decay, <= 0, same shape.
        u: bonus of the current token [H, N].
        state: initial state [B or S, H, N (key), N (value)]; None for zeros.
        cu_seqlens: int32 [S + 1], borders of the packed sequences, 0 first and T_total last; None with [B, T, H, N].
        backend: "native" (our own kernels), "chunked" or "naive" (PyTorch; the latter is the reference), or "auto":
            native where supported, else one of the other two by length.
        bounds: a copy of cu_seqlens on r's device, which "native" needs; None makes one at each call.

    Returns:
        y in r's shape and dtype, and the final state [B or S, H, N, N] in float32 (float64 for float64 inputs).
    """
    forms: dict[str, Form] = {"native": partial(native.wkv6_native, bounds=bounds), "chunked": chunked.wkv6_chunked,
                              "naive": reference.wkv6_naive}
    return _run(forms, (r, log_w, k, v), (u,), state, cu_seqlens, backend)


def wkv7(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor | None = None,
         cu_seqlens: Tensor | None = None, backend: str = "auto", bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The RWKV-7 recurrence (arXiv:2503.14456, eq. 16-18).

    Args:
        r, k, v: [B, T, H, N], or packed [T_total, H, N], of any floating dtype.
        log_w: log of the decay, same shape; in [-0.61, 0], as RWKV-7 defines it, for the chunked form.
        kappa: removal key, of unit length over N. a: in-context learning rate in (0, 1). Same shape.
        state: initial state [B or S, H, N (value), N (key)]; None for zeros.
        cu_seqlens, backend, bounds, and the results: as for `wkv6`.
    """
    forms: dict[str, Form] = {"native": partial(native.wkv7_native, bounds=bounds), "chunked": chunked.wkv7_chunked,
                              "naive": reference.wkv7_naive}
    return _run(forms, (r, log_w, k, v, kappa, a), (), state, cu_seqlens, backend)


def wkv6_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """One token of each sequence by `wkv6`, without gradients: [S, H, N] -> y; the state [S, H, N, N] is updated in place.

    No value is read on the host, so that a CUDA graph can capture it.
    """
    def token(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.wkv6_token(r, log_w.exp(), k, v, u, state)

    return _step(native.wkv6_step, token, (r, log_w, k, v), (u,), state)


def wkv7_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """The same by `wkv7`."""
    def token(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return reference.wkv7_token(r, log_w.exp(), k, v, kappa, kappa * a, state)

    return _step(native.wkv7_step, token, (r, log_w, k, v, kappa, a), (), state)


def _step(kernel: Callable[..., Tensor], token: Callable[..., tuple[Tensor, Tensor]], by_token: tuple[Tensor, ...],
          by_head: tuple[Tensor, ...], state: Tensor) -> Tensor:
    supported = native.supports(by_token[0])
    inputs = *_convert(by_token, supported), *(x.to(state.dtype) for x in by_head)
    if supported:
        y = kernel(*inputs, state)
    else:
        y, after = token(*inputs, state)
        state.copy_(after)
    return y.to(by_token[0].dtype)


def _run(forms: dict[str, Form], by_token: tuple[Tensor, ...], by_head: tuple[Tensor, ...], state: Tensor | None,
         cu_seqlens: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    r = by_token[0]
    if cu_seqlens is None:
        batch, length = r.shape[:2]
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
        by_token = tuple(x.flatten(0, 1) for x in by_token)
    backend = _choose(by_token[0], cu_seqlens, backend)
    compute = torch.float64 if r.dtype == torch.float64 else torch.float32
    inputs = *_convert(by_token, backend == "native"), *(x.to(compute) for x in by_head)
    n_sequences, (n_head, head_size) = len(cu_seqlens) - 1, r.shape[-2:]
    if state is None:
        state = torch.zeros(n_sequences, n_head, head_size, head_size, dtype=compute, device=r.device)
    y, state = forms[backend](*inputs, state.to(compute), cu_seqlens)
    return y.to(r.dtype).view(r.shape), state


def _convert(by_token: tuple[Tensor, ...], to_kernels: bool) -> list[Tensor]:
    """Convert inputs. The kernels read bfloat16 themselves, but errors of the decay would accumulate, so it is always float32."""
    compute = torch.float64 if by_token[0].dtype == torch.float64 else torch.float32
    halved = to_kernels and all(x.dtype == torch.bfloat16 for i, x in enumerate(by_token) if i != LOG_W)
    return [x.to(torch.bfloat16 if halved and i != LOG_W else compute) for i, x in enumerate(by_token)]


def _choose(r: Tensor, cu_seqlens: Tensor, backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {BACKENDS}")
    if backend == "native" and not native.supports(r):
        raise ValueError(f"the native kernels do not support {r.dtype} heads of {r.shape[-1]} on {r.device.type} here")
    if backend != "auto":
        return backend
    if native.supports(r):
        return "native"
    return "naive" if max(sequence_bounds(cu_seqlens)[1].tolist(), default=0) <= SHORT else "chunked"
