"""The recurrent state of RWKV: constant in size, so it can be forked and kept for hundreds of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.checkpoint.dimensions import Dimensions


@dataclass
class State:
    """A model's state after S sequences; each list has one tensor a layer.

    att_shift, ffn_shift: the last token's normed input of time mixing and channel mixing, [S, n_embd].
    wkv: the recurrence's matrix, [S, n_head, head_size, head_size] in float32; v6 [key, value], v7 [value, key].
    """

    att_shift: list[Tensor]
    wkv: list[Tensor]
    ffn_shift: list[Tensor]

    @staticmethod
    def zeros(dimensions: Dimensions, n_sequences: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> "State":
        """The state before any token. float64 models keep wkv in float64 too, all others in float32."""
        n = dimensions.head_size
        exact = torch.float64 if dtype == torch.float64 else torch.float32

        def layers(*shape: int, dtype: torch.dtype) -> list[Tensor]:
            return [torch.zeros(n_sequences, *shape, dtype=dtype, device=device) for _ in range(dimensions.n_layer)]

        return State(layers(dimensions.n_embd, dtype=dtype), layers(dimensions.n_head, n, n, dtype=exact),
                     layers(dimensions.n_embd, dtype=dtype))

    def rows(self, first: int, last: int) -> "State":
        """A view of sequences first .. last - 1."""
        return State(*([x[first:last] for x in part] for part in (self.att_shift, self.wkv, self.ffn_shift)))

    def clone(self) -> "State":
        return State(*([x.clone() for x in part] for part in (self.att_shift, self.wkv, self.ffn_shift)))

    def copy_(self, other: "State") -> None:
        """Copy the states of the same number of sequences, or one state for all."""
        own = [*self.att_shift, *self.wkv, *self.ffn_shift]
        for to, source in zip(own, [*other.att_shift, *other.wkv, *other.ffn_shift], strict=True):
            if to is not source:
                to.copy_(source)
