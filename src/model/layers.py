"""What RWKV-6 and RWKV-7 share: packed token shift, norms, and parameters seen at the activations' precision."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Borders(NamedTuple):
    """int32, of sequences packed end to end: 0 first, then the end of each."""

    cu_seqlens: Tensor  # on the CPU
    bounds: Tensor  # the same on the model's device, for all layers and both directions


class Packing(NamedTuple):
    """Borders of S sequences packed end to end in [T_total, ...]; empty ones keep their state.

    The first of them, the roots, continue from the model's given state; the others, if any, from a root's end.
    """

    roots: Borders
    others: Borders | None  # counted from the end of the roots; None if there are no others
    parents: Tensor | None  # int64 [S - R], the root that each of the others continues from
    rows: Tensor  # int64, the sequences that have a token
    first: Tensor  # int64, where each of them starts
    last: Tensor  # int64, its last token
    root_rows: Tensor  # int64, the roots among `rows`


# In place of a Packing: one token of each sequence, without gradients; the recurrence's states are updated in place.
ONE_EACH = None


def read_packing(cu_seqlens: Tensor, parents: Tensor | None, device: torch.device) -> Packing:
    borders = cu_seqlens.to("cpu", torch.int64)
    n_roots = len(borders) - 1 - (0 if parents is None else len(parents))
    rows = (borders[1:] > borders[:-1]).nonzero().squeeze(-1)
    indices = rows, borders[:-1][rows], borders[1:][rows] - 1, rows[rows < n_roots]
    of_roots = borders[:n_roots + 1].int()
    of_others = None if parents is None else (borders[n_roots:] - borders[n_roots]).int()
    bounds = _together([of_roots] if of_others is None else [of_roots, of_others], device)
    return Packing(Borders(of_roots, bounds[0]), of_others if of_others is None else Borders(of_others, bounds[1]), parents,
                   *_together(indices, device))


def _together(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Vectors of one dtype on the CPU, moved to the device by one asynchronous copy."""
    if device.type == "cpu":
        return tensors
    joined = torch.cat(list(tensors))
    return (joined.pin_memory() if device.type == "cuda" else joined).to(device, non_blocking=True).split([*map(len, tensors)])


def token_shift(x: Tensor, before: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Each token's predecessor in its own sequence, and the last tokens for the next call.

    x [T_total, D], before [R, D] (the token before each root's first) -> previous [T_total, D], last tokens [S, D].
    """
    if packing is ONE_EACH:
        return before, x
    if packing.parents is not None:
        ends = before.index_copy(0, packing.root_rows, x[packing.last[:len(packing.root_rows)]])
        before = torch.cat((before, ends[packing.parents]))
    previous = torch.cat((x[:1], x[:-1])).index_copy(0, packing.first, before[packing.rows])
    return previous, before.index_copy(0, packing.rows, x[packing.last])


def mix_tokens(x: Tensor, previous: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """x + (previous - x) * mix for each mix [D] or [T_total, D]: x, previous [T_total, D] -> one of their shape for each mix."""
    return _Mix.apply(x, previous, *(like(mix, x) for mix in mixes))


class _Mix(torch.autograd.Function):
    """One pass over memory for each mix and direction, and nothing kept for the backward if the mixes are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, previous: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
        delta = previous - x
        ctx.save_for_backward(delta if any(ctx.needs_input_grad[2:]) else None, *mixes)
        return tuple(torch.addcmul(x, delta, mix) for mix in mixes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        delta, *mixes = ctx.saved_tensors
        d_x, d_previous = gradients[0].clone(), gradients[0] * mixes[0]
        for gradient, mix in zip(gradients[1:], mixes[1:], strict=True):
            d_x.add_(gradient)
            d_previous.addcmul_(gradient, mix)
        d_mixes = ((gradient * delta).sum_to_size(mix.shape) if needed else None
                   for gradient, mix, needed in zip(gradients, mixes, ctx.needs_input_grad[2:], strict=True))
        return d_x.sub_(d_previous), d_previous, *d_mixes


def relu_square(x: Tensor) -> Tensor:
    """max(x, 0)^2, of any shape."""
    return _ReluSquare.apply(x)


class _ReluSquare(torch.autograd.Function):
    """The derivative is 2 max(x, 0), twice the root of the result, which an adapter on the next product keeps anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = torch.relu(x).square_()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (result,) = ctx.saved_tensors
        return result.sqrt().mul_(gradient).mul_(2)


@torch.compiler.disable
def recur(wkv: Callable[..., tuple[Tensor, Tensor]], step: Callable[..., Tensor], by_token: Sequence[Tensor], state: Tensor,
          packing: Packing | None) -> tuple[Tensor, Tensor]:
    """A recurrence over the roots, then over the sequences that continue them; or a single step.

    wkv(*by_token, state=, cu_seqlens=, bounds=), step(*by_token, state=); by_token [T_total, H, N], state [R, H, N, N]
    -> y [T_total, H, N], state [S, H, N, N].
    """
    if packing is ONE_EACH:
        return step(*by_token, state=state), state
    if packing.others is None:
        return wkv(*by_token, state=state, **packing.roots._asdict())
    at = int(packing.roots.cu_seqlens[-1])
    roots, others = zip(*(x.tensor_split((at,)) for x in by_token), strict=True)
    y, ends = wkv(*roots, state=state, **packing.roots._asdict())
    y_others, ends_others = wkv(*others, state=ends[packing.parents], **packing.others._asdict())
    return torch.cat((y, y_others)), torch.cat((ends, ends_others))


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A vector or low-rank matrix at x's precision; official vectors are stored as [1, 1, D].

    Frozen parameters already have it; trained ones are float32, so that small steps are not rounded away.
    """
    return (parameter.flatten() if parameter.dim() == 3 else parameter).to(x.dtype)


def layer_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """x [T_total, D] -> its layer norm in `dtype`, computed at x's precision."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps).to(dtype)


def head_norm(y: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalize each head on its own: y [T_total, H, N] -> [T_total, H * N]."""
    return F.group_norm(y.flatten(1), norm.num_groups, norm.weight.to(y.dtype), norm.bias.to(y.dtype), norm.eps)


def vector(n_embd: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, n_embd))


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
