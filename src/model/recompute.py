"""Gradient checkpointing of a block that keeps what is expensive to compute and cheap to store: products no wider than their
inputs.

A product costs the width of its input for each number of its result. So the square products of linear layers (r, k, v, output)
and the narrowing ones (the FFN's value) are kept. The widening ones (the FFN's key) are recomputed, like the adapters' parts,
low-rank pairs, element-wise operations and the recurrence.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import LinearLayer, Product
from src.model.layers import Packing

N_ARGUMENTS = 5  # a block's tensor arguments


def recomputed(block: nn.Module, x: Tensor, v_first: Tensor | None, att_shift: Tensor, wkv: Tensor, ffn_shift: Tensor,
               packing: Packing | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """The block's results; the backward recomputes most of the intermediate ones."""
    arguments = (x, v_first, att_shift, wkv, ffn_shift)
    parameters = list(block.parameters())
    if not torch.is_grad_enabled():
        return block(*arguments, packing, dtype)
    if any(parameter.numel() == 0 for parameter in parameters):
        # DeepSpeed's stage 3 gathers a parameter only while its own layer runs, so it can't be an operator's input here.
        return checkpoint(block, *arguments, packing, dtype, use_reentrant=False)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    x, own_v, *states = _Recomputed.apply(block, packing, dtype, *arguments, *trained)
    return x, own_v if v_first is None else v_first, *states


class _Recomputed(torch.autograd.Function):
    """A block as one operator of its arguments and its trained parameters, so that these get their gradients as usual."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, packing: Packing | None, dtype: torch.dtype, x: Tensor,
                *others: Tensor | None) -> tuple:
        inputs: tuple[Tensor | None, ...] = (x, *others)
        arguments, device = inputs[:N_ARGUMENTS], x.device
        kept: list[Tensor] = []
        before = _random_states(device)
        x, v_first, *states = block(*arguments, packing, dtype, product=_keeping(kept))
        ctx.drew_from = None if all(map(torch.equal, before, _random_states(device))) else before
        ctx.block, ctx.rest, ctx.n_inputs = block, (packing, dtype), len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *kept)
        return x, None if v_first is arguments[1] else v_first, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        arguments = [x if x is None else x.detach().requires_grad_(need)
                     for x, need in zip(saved[:N_ARGUMENTS], needed[:N_ARGUMENTS], strict=True)]
        with torch.enable_grad(), _drawing_again(ctx.drew_from, saved[0].device):
            outputs = ctx.block(*arguments, *ctx.rest, product=_from_kept(saved[ctx.n_inputs:]))
        reached = [(y, d) for y, d in zip(outputs, gradients, strict=True) if d is not None and y.requires_grad]
        inputs = [*arguments, *saved[N_ARGUMENTS:ctx.n_inputs]]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad([y for y, _ in reached], wanted, [d for _, d in reached], allow_unused=True))
        return None, None, None, *(next(found) if need else None for need in needed)


def _keeping(kept: list[Tensor]) -> Product:
    """A Product that appends the results worth keeping to `kept`, in the order they are computed."""

    def base_product(layer: LinearLayer, x: Tensor) -> Tensor:
        y = _computed(layer, x)
        if layer.out_features <= layer.in_features:
            kept.append(y)
        return y

    return _through(base_product)


def _from_kept(kept: Sequence[Tensor]) -> Product:
    """A Product that takes these results instead of computing them."""
    products = iter(kept)

    def base_product(layer: LinearLayer, x: Tensor) -> Tensor:
        if layer.out_features > layer.in_features:
            return _computed(layer, x)
        weight = getattr(layer, "weight", None)  # absent in a quantized layer and in an adapter over one
        return _Kept.apply(x, weight if weight is not None and weight.requires_grad else None, next(products).detach(), layer)

    return _through(base_product)


def _through(base_product: Product) -> Product:
    """Apply linear layers with base_product instead of their weights' own products."""
    return lambda layer, x: layer(x, base_product) if isinstance(layer, AdaptedLinear) else base_product(layer, x)


def _computed(layer: LinearLayer, x: Tensor) -> Tensor:
    return layer.base_forward(x) if isinstance(layer, AdaptedLinear) else layer(x)


class _Kept(torch.autograd.Function):
    """x W^T from its kept result: x [T_total, in_features], W [out_features, in_features], or None if it is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, product: Tensor,
                layer: LinearLayer) -> Tensor:
        ctx.layer, ctx.weight_dtype = layer, None if weight is None else weight.dtype
        ctx.save_for_backward(None if weight is None else x)
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,), d_x = ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:
            d_x = gradient @ ctx.layer.rows(0, ctx.layer.out_features, gradient.dtype)
        return d_x, None if x is None else (gradient.T @ x).to(ctx.weight_dtype), None, None


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that dropout may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _drawing_again(states: list[Tensor] | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from these states, and restore the generators' own afterwards; None if nothing is drawn."""
    if states is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
