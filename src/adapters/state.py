"""State tuning: trains only the recurrence's state before the first token, one matrix a head.

S_0 [H, N, N] replaces the zeros; it is zero at the start, so that training starts from the base model. What trains:
`att.time_state`, as it is called in BlinkDL/RWKV-LM and RWKV-PEFT. It is laid out [head, value, key] in v6 and v7, as RWKV-PEFT
trains it and runtimes read it: the `rwkv` package transposes it for v6, whose state is [key, value] there; v7's is [value, key].
Token-shift states stay zero, as they do there.

No weight can express a state, so nothing is merged: runtimes load a file of only the states.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

LEAF = "time_state"


def add_state(block: nn.Module) -> None:
    """Give a model's block an initial state of zeros."""
    norm = block.get_submodule("att.ln_x")
    assert isinstance(norm, nn.GroupNorm)
    heads, size = norm.num_groups, norm.num_channels // norm.num_groups
    state = nn.Parameter(torch.zeros(heads, size, size, device=norm.weight.device))
    block.get_submodule("att").register_parameter(LEAF, state)


def state_shape(base: Mapping[str, tuple[int, ...]], layer: str) -> tuple[int, ...]:
    """[H, N, N] of a block's state, from the shapes of a base's tensors: v7's r_k and v6's time_faaaa are [H, N]."""
    heads, size = next(base[name] for leaf in ("r_k", "time_faaaa") if (name := f"blocks.{layer}.att.{leaf}") in base)
    return heads, size, size


def states_in(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The states among named tensors, `blocks.N.att.time_state`."""
    return {name: tensor for name, tensor in weights.items() if name.endswith(f".att.{LEAF}")}
