"""How many rows `--batch_size auto` takes, from the true sizes of a row."""

import torch

from src.generation import memory
from src.generation.config import Sampling
from src.model import State
from tests.random_checkpoint import make_dimensions


def test_rows_by_memory(monkeypatch):
    dimensions = make_dimensions("x070", 24, 2048, 64, 65536)
    state = State.zeros(dimensions, 1, torch.float32, "meta")
    held = sum(x.nbytes for part in (state.att_shift, state.wkv, state.ffn_shift) for x in part)
    cpu = torch.device("cpu")
    for free, least, most in ((2**40, memory.MOST["cpu"], memory.MOST["cpu"]), (2**20, 1, 1), (40 * held, 10, 19)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert least <= memory.rows_that_fit(dimensions, Sampling(), cpu) <= most


def test_free_memory_is_read():
    assert 2**20 < memory.free_bytes(torch.device("cpu")) < 2**50
