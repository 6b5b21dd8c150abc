"""A step of all rows as a CUDA graph for each size of batch, so that a GPU goes on from kernel to kernel without Python."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

# Steps that run as they are before one is captured: libraries set up in them what a capture may not.
WARM_UPS = 2


class Graphs:
    """`step(n)` for n rows, by graphs for powers of two and for `size` rows: what is done in slots behind the n is lost."""

    def __init__(self, step: Callable[[int], Tensor], size: int, device: torch.device):
        self._step, self._size, self._device = step, size, device
        self._runs: Counter[int] = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one replay's temporaries are void in the next, so all graphs share theirs

    def __call__(self, n: int) -> Tensor:
        """The step's result for at least n rows, in memory that the next step of this size writes over."""
        size = bucket(n, self._size)
        if size not in self._graphs:
            self._runs[size] += 1
            if self._runs[size] <= WARM_UPS:
                return self._step(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):  # which runs nothing
                drawn = self._step(size)
            self._graphs[size] = graph, drawn
        graph, drawn = self._graphs[size]
        graph.replay()
        return drawn


def bucket(n: int, most: int) -> int:
    """How many rows a step for n of them is done for."""
    return min(1 << (n - 1).bit_length(), most)
