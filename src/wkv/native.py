"""The recurrences' own kernels (cuda/), called as torch operators.

They take what the other backends take and are differentiable. The backward recomputes states from checkpoints, so that
memory grows with T / interval, not with T. Where they can't be built one line says why, and PyTorch serves meanwhile.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from src.console import say
from src.errors import UserError
from src.wkv.library import load_library

# Sets of instructions that the CPU's kernels are built for, the highest first; as in cuda/instructions.cpp.
INSTRUCTIONS = ("avx512bf16", "avx512", "avx2", "default")
# As in cuda/cpu_kernels.h and cuda/cuda_kernels.h.
INTERVAL = 16
CHUNKED_HEADS, LARGEST_HEAD = (32, 64), 128
# Below this many tokens a sequence, on average, chunks are mostly padding.
SHORTEST_CHUNKED = 32


def wkv6_native(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor,
                cu_seqlens: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed v6; shapes as in `reference.wkv6_naive`; r, k, v of one dtype, the rest float32 (float64 with float64).

    bounds: cu_seqlens on r's device; copied there where None.
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
    """One token [S, H, N] of each sequence, as `wkv6_native` otherwise: y; the state moves on in place. Not differentiable."""
    return torch.ops.rwkv_wkv.wkv6_step(*(x.contiguous() for x in (r, log_w, k, v, u)), state)


def wkv7_step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """The same for `wkv7_native`."""
    return torch.ops.rwkv_wkv.wkv7_step(*(x.contiguous() for x in (r, log_w, k, v, kappa, a)), state)


def serves(r: Tensor) -> bool:
    """Whether the kernels take such inputs on this machine; builds them at the first question."""
    on_cpu = r.device.type == "cpu"
    return (on_cpu or (r.device.type == "cuda" and r.dtype != torch.float64)) and r.shape[-1] <= LARGEST_HEAD \
        and missing(r.device.type) is None


def recycle_memory() -> None:
    """From here on large CPU tensors take the memory of freed ones of like size (cuda/cpu_memory.cpp).

    A training step then peaks a quarter lower than with glibc, whose heap it fills with holes. Does nothing where the kernels
    can't be built.
    """
    if missing("cpu") is None:
        torch.ops.rwkv_wkv.recycle_memory()


def use_instructions(name: str) -> None:
    """From here on the CPU's kernels use this set of instructions, one of INSTRUCTIONS; before, the highest that torch uses here.

    Raises:
        UserError: the set is unknown, this processor has not got it, or the kernels can't be built.
    """
    if name not in INSTRUCTIONS:
        raise UserError(f"instructions {name!r} are unknown; choose one of {', '.join(INSTRUCTIONS)}")
    if (reason := missing("cpu")) is not None:
        raise UserError(f"instructions {name!r} can't be chosen without the kernels: {reason}")
    if name not in (here := torch.ops.rwkv_wkv.available_instructions()):
        raise UserError(f"this processor has no {name!r} instructions; choose one of {', '.join(here)}")
    torch.ops.rwkv_wkv.use_instructions(name)


def _borders(cu_seqlens: Tensor, bounds: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    return cu_seqlens, cu_seqlens.to(r.device, non_blocking=True) if bounds is None else bounds


def _form(r: Tensor, state: Tensor) -> tuple[int, bool]:
    """Tokens between two checkpoints, and whether the chunked CUDA kernel runs: by shape alone, so that tracing can follow."""
    return INTERVAL, r.device.type == "cuda" and r.shape[-1] in CHUNKED_HEADS and r.shape[0] >= SHORTEST_CHUNKED * state.shape[0]


def _needs_gradient(inputs: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


@cache
def missing(device: str) -> str | None:
    """None where the kernels for "cpu" or "cuda" are ready; else the reason, told once on stderr."""
    if device == "cuda" and (reason := missing("cpu")) is not None:
        return reason
    try:
        reason = load_library(device)
    except (RuntimeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason is not None:
        say(f"The WKV kernels for {device} are not used: {reason}. The recurrence runs in PyTorch meanwhile, several times "
            "slower.")
    elif device == "cpu":
        _register()
    return reason


def _register() -> None:
    """What tracing needs (shapes without values) and what autograd needs, for all devices."""
    for version, names in (("wkv6", ("r", "log_w", "k", "v", "u")), ("wkv7", ("r", "log_w", "k", "v", "kappa", "a"))):
        torch.library.register_fake(f"rwkv_wkv::{version}_forward", _fake_forward)
        torch.library.register_fake(f"rwkv_wkv::{version}_step", lambda r, *_: torch.empty_like(r))
        torch.library.register_fake(f"rwkv_wkv::{version}_backward", _fake_backward(len(names)))
        torch.library.register_autograd(f"rwkv_wkv::{version}_forward", _backward(version), setup_context=_keep)
    torch.library.register_fake("rwkv_wkv::int8_product", lambda x, codes, scales: x.new_empty(len(x), len(codes)))
    torch.library.register_fake("rwkv_wkv::int8_dequantize", lambda codes, scales, dtype: torch.empty_like(codes, dtype=dtype))


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    r, (state, _, _, interval, _, checkpoints) = arguments[0], arguments[-6:]
    rows = r.shape[0] // interval + state.shape[0] if checkpoints else 0
    return torch.empty_like(r), torch.empty_like(state), state.new_empty(rows, *state.shape[1:])


def _fake_backward(n_inputs: int) -> Callable[..., tuple[Tensor, ...]]:
    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        return *(torch.empty_like(x) for x in arguments[:n_inputs]), torch.empty_like(arguments[n_inputs + 4])

    return fake


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, cu_seqlens, bounds, ctx.interval, ctx.chunked, _ = inputs
    _, final_state, checkpoints = output
    ctx.state_like = (final_state.shape, final_state.dtype, final_state.device)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(*tensors, checkpoints, cu_seqlens, bounds)


def _backward(version: str) -> Callable[..., tuple[Tensor | None, ...]]:
    operator = f"{version}_backward"

    def backward(ctx: Any, d_y: Tensor | None, d_final_state: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        r, (shape, dtype, device) = saved[0], ctx.state_like
        d_y = torch.zeros_like(r) if d_y is None else d_y.contiguous()
        d_final_state = torch.zeros(shape, dtype=dtype, device=device) if d_final_state is None else d_final_state.contiguous()
        gradients = getattr(torch.ops.rwkv_wkv, operator)(*saved, d_y, d_final_state, ctx.interval, ctx.chunked)
        return *gradients, None, None, None, None, None

    return backward
