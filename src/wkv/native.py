"""The recurrences by our own kernels, called as torch operators.

They take the same arguments as the other backends and are differentiable. The backward recomputes states from checkpoints, so
memory grows with T / interval, not with T.
"""

import torch
from torch import Tensor

from src.kernels import missing

# The same as in cpu/cpu_kernels.h and cuda/cuda_kernels.h.
INTERVAL = 16
CHUNKED_HEADS, LARGEST_HEAD = (32, 64), 128
# Below this many tokens a sequence, on average, chunks are mostly padding.
SHORTEST_CHUNKED = 32


def wkv6_native(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
                cu_seqlens: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed v6; shapes as in `reference.wkv6_naive`; r, k, v of one dtype, the rest float32 (float64 with float64).

    bounds: cu_seqlens on r's device; None copies them there.
    """
    inputs = [x.contiguous() for x in (r, log_w, k, v, u, state)]
    borders = _borders(cu_seqlens, bounds, r)
    y, state, _ = torch.ops.rwkv_wkv.wkv6_forward(*inputs, *borders, *_form(r, state), _needs_gradient(inputs))
    return y, state


def wkv7_native(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor,
                cu_seqlens: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed v7; shapes as in `reference.wkv7_naive`; log_w and state float32 (float64 with float64), the rest of one dtype.

    bounds: as in `wkv6_native`.
    """
    inputs = [x.contiguous() for x in (r, log_w, k, v, kappa, a, state)]
    borders = _borders(cu_seqlens, bounds, r)
    y, state, _ = torch.ops.rwkv_wkv.wkv7_forward(*inputs, *borders, *_form(r, state), _needs_gradient(inputs))
    return y, state


def wkv6_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> Tensor:
    """One token [S, H, N] of each sequence, else like `wkv6_native`: y; the state is updated in place. Not differentiable."""
    return torch.ops.rwkv_wkv.wkv6_step(*(x.contiguous() for x in (r, log_w, k, v, u)), state)


def wkv7_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """The same for `wkv7_native`."""
    return torch.ops.rwkv_wkv.wkv7_step(*(x.contiguous() for x in (r, log_w, k, v, kappa, a)), state)


def supports(r: Tensor) -> bool:
    """Whether the kernels support such inputs on this machine; the first call builds them."""
    on_cpu = r.device.type == "cpu"
    return (on_cpu or (r.device.type == "cuda" and r.dtype != torch.float64)) and r.shape[-1] <= LARGEST_HEAD \
        and missing(r.device.type) is None


def _borders(cu_seqlens: Tensor, bounds: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    return cu_seqlens, cu_seqlens.to(r.device, non_blocking=True) if bounds is None else bounds


def _form(r: Tensor, state: Tensor) -> tuple[int, bool]:
    """Tokens between two checkpoints, and whether the chunked CUDA kernel runs: only by shape, so that it can be traced."""
    return INTERVAL, r.device.type == "cuda" and r.shape[-1] in CHUNKED_HEADS and r.shape[0] >= SHORTEST_CHUNKED * state.shape[0]


def _needs_gradient(inputs: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
