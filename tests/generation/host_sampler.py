"""The CUDA kernel that draws tokens, its own source compiled by an ordinary compiler and run on the CPU."""

import ctypes

import torch
from torch import Tensor

from src.generation.sampler import KernelSampler
from tests.kernels.host_kernels import library


class _Sample(ctypes.Structure):
    """As in cpu/sample.h."""

    _pointers = "logits", "next", "weight", "uniforms", "tokens", "counts", "row", "drawn"
    _fields_ = [*((name, ctypes.c_void_p) for name in _pointers),
                *((name, ctypes.c_int) for name in ("rows", "vocabulary", "capacity", "n_blank")),
                *((name, ctypes.c_float) for name in ("presence", "frequency", "decay", "temperature")),
                ("top_p", ctypes.c_double), ("top_k", ctypes.c_int)]


class HostSampler(KernelSampler):
    def draw(self, logits: Tensor) -> Tensor:
        how, (following, n_blank, weight) = self._sampling, self._rules
        drawn = torch.full((2, len(logits)), -7, dtype=torch.int32)
        pointers = (x.data_ptr() for x in (logits, following, weight, *self._tables, drawn))
        arguments = _Sample(*pointers, *logits.shape, how.max_tokens, n_blank, how.presence, how.frequency, how.penalty_decay,
                            how.temperature, how.top_p, how.top_k)
        assert library().run_sample(ctypes.byref(arguments)) == 0
        return drawn
