"""The rows that are written together, each in a slot: everything that a step reads and updates, in place.

A step's work does not depend on the rows' content, so on a GPU it can be a graph (graphs.py), and it never waits for the host.
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
    """For each slot: the state before the next token, the hidden vector that it is drawn from, and the sampler's tables."""

    def __init__(self, engine: Forward | Kernels, automaton: Automaton, weight: Tensor, sampling: Sampling, size: int):
        self._engine = engine
        self.sampler = choose_sampler(size, automaton, weight, sampling, engine.device)
        one = engine.fresh(1)
        # All layers in one tensor, [n_layer, slots, ...], so that a few operations move a row.
        parts = [torch.stack(part).repeat_interleave(size, dim=1) for part in (one.att_shift, one.wkv, one.ffn_shift)]
        self.state = State(*(list(part.unbind(0)) for part in parts))
        self.hidden = torch.zeros_like(self.state.att_shift[0])
        self._tables = [*parts, self.hidden.unsqueeze(0)]
        self._views: dict[int, State] = {}

    def step(self, n: int) -> Tensor:
        """Draw a token for each row in slots 0 .. n - 1 and advance the row: int32 [2, n], as `KernelSampler.draw`."""
        if n not in self._views:
            self._views[n] = self.state.rows(0, n)
        drawn = self.sampler.draw(self._engine.logits(self.hidden[:n]).float())
        self.hidden[:n] = self._engine.advance_each(drawn[0], self._views[n])
        return drawn

    def move(self, to: Sequence[int], source: Sequence[int]) -> None:
        """Copy the rows from slots `source` into slots `to`."""
        free, last = (torch.tensor(slots).to(self._engine.device, non_blocking=True) for slots in (to, source))
        for table in self._tables:
            table[:, free] = table[:, last]
        self.sampler.move(free, last)

    def take(self, slot: int) -> list[Tensor]:
        """A copy of a row's state, for others with the same prompt."""
        return [table[:, slot].clone() for table in self._tables]

    def put(self, slot: int, taken: Sequence[Tensor]) -> None:
        for table, one in zip(self._tables, taken, strict=True):
            table[:, slot] = one
