"""A step of all rows as a CUDA graph for each batch size, so that a GPU runs from kernel to kernel without Python."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

# Plain steps before a capture: libraries initialize in them, which is not allowed during a capture.
WARM_UPS = 2


class Graphs:
    """`step(n)` for n rows, by graphs for powers of two and for `size` rows; results in slots after the n are discarded."""

    def __init__(self, step: Callable[[int], Tensor], size: int, device: torch.device):
        self._step, self._size, self._device = step, size, device
        self._runs: Counter[int] = Counter()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # shared, since no replay needs the temporaries of another

    def __call__(self, n: int) -> Tensor:
        """The step's result for at least n rows, in memory that the next step of this size overwrites."""
        size = bucket(n, self._size)
        if size not in self._graphs:
            self._runs[size] += 1
            if self._runs[size] <= WARM_UPS:
                return self._step(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):  # a capture runs nothing
                drawn = self._step(size)
            self._graphs[size] = graph, drawn
        graph, drawn = self._graphs[size]
        graph.replay()
        return drawn


def bucket(n: int, most: int) -> int:
    """The number of rows of the step that is run for n rows."""
    return min(1 << (n - 1).bit_length(), most)
