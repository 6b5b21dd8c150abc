"""The rows that are written together, each in a slot: all that one step reads and changes, in place.

A step is the same work whatever the rows hold, so that on a GPU it can be a graph (graphs.py), and never waits for the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from src.generation.automaton import Automaton
from src.generation.config import Sampling
from src.generation.sampler import choose_sampler
from src.model import State
from src.model.decode import Forward, Kernels


class Slots:
    """Of each slot: the state before the next token, the hidden vector that it is drawn from, and what the sampler remembers."""

    def __init__(self, engine: Forward | Kernels, automaton: Automaton, weight: Tensor, sampling: Sampling, size: int):
        self._engine = engine
        self.sampler = choose_sampler(size, automaton, weight, sampling, engine.device)
        one = engine.fresh(1)
        # All layers side by side, [n_layer, slots, ...], so that a row moves by a few operations.
        parts = [torch.stack(part).repeat_interleave(size, dim=1) for part in (one.att_shift, one.wkv, one.ffn_shift)]
        self.state = State(*(list(part.unbind(0)) for part in parts))
        self.hidden = torch.zeros_like(self.state.att_shift[0])
        self._tables = [*parts, self.hidden.unsqueeze(0)]
        self._views: dict[int, State] = {}

    def step(self, n: int) -> Tensor:
        """A token for each of the rows in slots 0 .. n - 1, and on: int32 [2, n], as `KernelSampler.draw`."""
        if n not in self._views:
            self._views[n] = self.state.rows(0, n)
        drawn = self.sampler.draw(self._engine.logits(self.hidden[:n]).float())
        self.hidden[:n] = self._engine.advance_each(drawn[0], self._views[n])
        return drawn

    def move(self, to: Sequence[int], source: Sequence[int]) -> None:
        """Into slots `to` the rows from slots `source`."""
        free, last = (torch.tensor(slots).to(self._engine.device, non_blocking=True) for slots in (to, source))
        for table in self._tables:
            table[:, free] = table[:, last]
        self.sampler.move(free, last)

    def take(self, slot: int) -> list[Tensor]:
        """What a row read so far, for others with the same prompt."""
        return [table[:, slot].clone() for table in self._tables]

    def put(self, slot: int, taken: Sequence[Tensor]) -> None:
        for table, one in zip(self._tables, taken, strict=True):
            table[:, slot] = one
