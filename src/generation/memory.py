"""How many rows memory has room for."""

from pathlib import Path

import torch

from src.checkpoint.dimensions import Dimensions
from src.generation.config import Sampling

# More rows at once make a step no cheaper by the row.
MOST = {"cpu": 128, "cuda": 512}
# Of the memory that is free once the weights are there: the rest is for prompts and for others.
SHARE = 0.5


def rows_that_fit(dimensions: Dimensions, sampling: Sampling, device: torch.device) -> int:
    """The rows that `--batch_size auto` takes, at least one: each has a state, logits in a few copies, and the tokens drawn."""
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
