"""States taken apart and put together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.model import State


def select(state: State, index: Sequence[int] | Tensor) -> State:
    """The states of these sequences, in that order; repeats fork a sequence."""
    return State(*([x[torch.as_tensor(index)] for x in part] for part in (state.att_shift, state.wkv, state.ffn_shift)))


def cat(states: Sequence[State]) -> State:
    """The sequences of all `states`, at least one of them, one after another."""
    parts = ([state.att_shift for state in states], [state.wkv for state in states], [state.ffn_shift for state in states])
    return State(*([torch.cat(layer) for layer in zip(*part, strict=True)] for part in parts))
