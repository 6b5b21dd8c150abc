"""log softmax(hidden W^T) at one target a row, without ever storing all logits.

The head's product is computed in tiles of some rows by some of the vocabulary, with running maxima and sums (the online softmax
of Milakov and Gimelshein 2018, arXiv:1805.02867). If the head is frozen, the forward also computes the gradient,
d log p(t) / d hidden = W_t - sum_v p_v W_v, and the backward only scales it: a step costs two products, not three.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.adapters.adapted import AdaptedLinear
from src.adapters.linear import Linear, LinearLayer
from src.quantization.linear import QuantizedLinear

ROWS = 1024
# Elements of a tile. Its three copies at most (product, float32, back in the products' dtype) take 12 and 48 MB; with a factor
# there are two more, 20 and 80 MB.
TILE_ON_CPU, TILE_ON_GPU = 1 << 20, 1 << 22
# Quantized weights come in blocks of this many elements, and a tile must not cut a block.
ALIGNED = 64


def target_log_probs(head: Linear | QuantizedLinear | AdaptedLinear, hidden: Tensor, targets: Tensor) -> Tensor:
    """log p(target) of each row, in nats.

    Args:
        head: frozen, quantized, in training, or with an adapter.
        hidden: [A, n_embd]. targets: int64 [A].

    Returns:
        [A] in float32 (float64 for float64 inputs), differentiable in hidden and in the head's trained parameters.
    """
    down = up = factor = None
    if isinstance(head, AdaptedLinear):
        down, up, factor = head.down(hidden), head.up, head.factor(hidden.dtype)
    weight = head.weight if isinstance(head, Linear) else None
    return _TargetLogProbs.apply(hidden, down, weight, up, factor, head, targets)


class _TargetLogProbs(torch.autograd.Function):
    """The logits are (hidden W^T + down up^T) * factor, with down [A, r], up [V, r] and factor [V] of an adapter, or None."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, down: Tensor | None, weight: Tensor | None, up: Tensor | None, factor: Tensor | None,
                head: LinearLayer, targets: Tensor) -> Tensor:
        ctx.head = head
        only_hidden = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:5])
        full = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(len(hidden), dtype=full, device=hidden.device)
        log_sums = torch.empty_like(log_probs)
        direction = torch.empty_like(hidden) if only_hidden else None
        for rows in _rows(len(hidden)):
            x, z, t = hidden[rows], None if down is None else down[rows], targets[rows]
            highest = torch.full((len(x), 1), -math.inf, dtype=full, device=x.device)
            total, at_target = torch.zeros_like(highest), torch.zeros_like(highest)
            mean = torch.zeros(len(x), x.shape[1], dtype=full, device=x.device) if only_hidden else None
            for first, last in _columns(head, len(x), x.device):
                w = head.rows(first, last, x.dtype)
                logits = _products(x, z, w, up, first, last).to(full)
                if factor is not None:
                    logits.mul_(factor[first:last])
                at = (t - first)[:, None]
                inside = (at >= 0) & (at < last - first)
                at_target = torch.where(inside, logits.gather(1, at.clamp(0, last - first - 1)), at_target)
                higher = torch.maximum(highest, logits.amax(1, keepdim=True))
                shrink = (highest - higher).exp_()
                likely = logits.sub_(higher).exp_()
                total = total.mul_(shrink).add_(likely.sum(1, keepdim=True))
                if mean is not None:
                    mean.mul_(shrink)
                    likely = likely.to(x.dtype)
                    mean = mean.addmm_(likely, w) if mean.dtype == x.dtype else mean.add_(likely @ w)
                highest = higher
            log_sum = highest + total.log()
            log_sums[rows], log_probs[rows] = log_sum.squeeze(1), (at_target - log_sum).squeeze(1)
            if direction is not None and mean is not None:
                direction[rows] = _at_rows(head, t, x.dtype).to(full) - mean / total
        ctx.save_for_backward(*((direction,) if only_hidden else (hidden, down, up, factor, targets, log_sums)))
        return log_probs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (direction,) = ctx.saved_tensors
            return (direction * gradient[:, None]).to(direction.dtype), *[None] * 6
        hidden, down, up, factor, targets, log_sums = ctx.saved_tensors
        inputs = hidden, down, ctx.head.weight if ctx.needs_input_grad[2] else None, up, factor
        d_hidden, d_down, d_weight, d_up, d_factor = gradients = [
            torch.zeros_like(x, dtype=log_sums.dtype) if needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad[:5], strict=True)]
        for rows in _rows(len(hidden)):
            x, z, t = hidden[rows], None if down is None else down[rows], targets[rows]
            for first, last in _columns(ctx.head, len(x), x.device):
                w = ctx.head.rows(first, last, x.dtype)
                d_logits = products = _products(x, z, w, up, first, last).to(log_sums.dtype)
                if factor is not None:
                    d_logits = products * factor[first:last]
                d_logits.sub_(log_sums[rows, None]).exp_().neg_()
                at = (t - first)[:, None]
                inside = ((at >= 0) & (at < last - first)).to(d_logits.dtype)
                d_logits.scatter_add_(1, at.clamp(0, last - first - 1), inside)
                d_logits.mul_(gradient[rows, None])
                if d_factor is not None:
                    d_factor[first:last] += (d_logits * products).sum(0)
                if factor is not None:
                    d_logits.mul_(factor[first:last])
                d_products = d_logits.to(x.dtype)
                if d_hidden is not None:
                    d_hidden[rows] += d_products @ w
                if d_weight is not None:
                    d_weight[first:last] += d_products.T @ x
                if d_down is not None:
                    d_down[rows] += d_products @ up[first:last].to(x.dtype)
                if d_up is not None and z is not None:
                    d_up[first:last] += d_products.T @ z
        return *(None if d is None else d.to(x.dtype) for x, d in zip(inputs, gradients, strict=True)), None, None


def _rows(n: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, n, ROWS)]


def _columns(head: LinearLayer, n_rows: int, device: torch.device) -> list[tuple[int, int]]:
    """Borders of the vocabulary's tiles for `n_rows` rows."""
    tile = TILE_ON_CPU if device.type == "cpu" else TILE_ON_GPU
    width = max(1, tile // n_rows // ALIGNED) * ALIGNED
    return [(first, min(first + width, head.out_features)) for first in range(0, head.out_features, width)]


def _products(x: Tensor, z: Tensor | None, w: Tensor, up: Tensor | None, first: int, last: int) -> Tensor:
    """The logits without their factor."""
    products = F.linear(x, w)
    return products if z is None or up is None else products + F.linear(z, up[first:last].to(z.dtype))


def _at_rows(head: LinearLayer, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """The targets' rows of the frozen weight."""
    if isinstance(head, Linear):
        return head.weight[targets].to(dtype)
    result = torch.empty(len(targets), head.in_features, dtype=dtype, device=targets.device)
    for first, last in _columns(head, head.in_features, targets.device):
        inside = (targets >= first) & (targets < last)
        rows = head.rows(first, last, dtype)[(targets - first).clamp(0, last - first - 1)]
        result = torch.where(inside[:, None], rows, result)
    return result
