"""Registers the kernels' operators for tracing (shapes without values) and autograd, on all devices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Call once, after loading the CPU's library, which declares the operators."""
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
