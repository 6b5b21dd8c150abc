"""The step of one token a row as a CUDA graph for each size of batch, so that the device never waits for Python between kernels.

Only the model's step is captured. The batch's slots (src/generation/batch.py) are the graph's own memory: a graph for 2^i rows
also moves free slots behind the last row, which the next prompt read into them overwrites.
"""

import torch
from torch import Tensor

from src.model.decode import Forward
from src.model.layers import read_packing
from src.model.rwkv import RWKV
from src.model.state import State

# Runs before a capture, in which libraries set up what a capture may not.
WARM_UPS = 2


class Graphs(Forward):
    """`Forward` on a CUDA device; prompts go by the model's own forward."""

    def __init__(self, model: RWKV):
        super().__init__(model)
        self._slots: State | None = None
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def fresh(self, n_sequences: int) -> State:
        """The largest state asked for is taken for the batch's slots; a larger one makes the graphs of the one before void."""
        state = super().fresh(n_sequences)
        if self._slots is None or n_sequences > len(self._slots.wkv[0]):
            self._slots = state
            self._graphs.clear()
        return state

    def advance(self, tokens: Tensor, cu_seqlens: Tensor, state: State) -> Tensor:
        n = len(cu_seqlens) - 1
        if len(tokens) > n or state.wkv[0].data_ptr() != self._slots.wkv[0].data_ptr():
            return super().advance(tokens, cu_seqlens, state)
        size = min(1 << (n - 1).bit_length(), len(self._slots.wkv[0]))
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, token_buffer, hidden = self._graphs[size]
        token_buffer[:n].copy_(tokens)
        graph.replay()
        return hidden[:n].clone()  # the next replay writes over it

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        state, tokens = self._slots.rows(0, size), torch.zeros(size, dtype=torch.int64, device=self.device)
        packing = read_packing(torch.arange(size + 1, dtype=torch.int32), None, self.device)

        def step() -> Tensor:
            hidden, after = self.model.forward_packed(tokens, packing, state)
            state.copy_(after)
            return hidden

        saved, stream = state.clone(), torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        state.copy_(saved)  # the capture itself runs nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = step()
        return graph, tokens, hidden
