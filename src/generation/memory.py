"""How many rows fit in memory."""

from pathlib import Path

import torch

from src.checkpoint.dimensions import Dimensions
from src.generation.config import Sampling

# With more rows a step gets no cheaper per row.
MOST = {"cpu": 128, "cuda": 512}
# Share of the memory that is free after loading the weights; the rest is for prompts and other programs.
SHARE = 0.5


def rows_that_fit(dimensions: Dimensions, sampling: Sampling, device: torch.device) -> int:
    """The rows of `--batch_size auto`, at least one: each has a state, a few copies of logits, and the tokens drawn."""
    state = dimensions.n_layer * dimensions.n_embd * (dimensions.head_size + 2) * 4
    row = state + 4 * 4 * dimensions.vocab_size + 16 * sampling.max_tokens
    return max(1, min(MOST.get(device.type, 128), int(SHARE * free_bytes(device)) // row))


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 2**30  # a system that does not say
