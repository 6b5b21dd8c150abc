"""Models of the released sizes with random weights, drawn on the GPU without a file, and what the GPU itself can do."""

import sys
from typing import Any

import torch
from results import read_results, write_results

from src.model import RWKV, build_model
from tests.random_checkpoint import RandomWeights, make_dimensions

VOCABULARY = 65536
# version, blocks, width
SIZES = {"0.1B": ("x070", 12, 768), "0.4B": ("x070", 24, 1024), "1.5B": ("x070", 24, 2048), "2.9B": ("x070", 32, 2560),
         "7.2B": ("x070", 32, 4096), "1.6B v6": ("x060", 24, 2048), "7B v6": ("x060", 32, 4096)}


def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        print("nothing to measure: torch finds no GPU here", file=sys.stderr)
        raise SystemExit(2)


def random_model(size: str, quantize: str | None, quantize_head: bool = False) -> RWKV:
    """In bfloat16, on the GPU."""
    version, n_layer, n_embd = SIZES[size]
    dimensions = make_dimensions(version, n_layer, n_embd, 64, VOCABULARY)
    weights = RandomWeights(dimensions, dtype=torch.bfloat16, device="cuda")
    return build_model(weights, dimensions, torch.bfloat16, "cuda", quantize, quantize_head=quantize_head)


def copy_rate() -> float:
    """Bytes read and written a second by copies of 2 GB."""
    x = torch.randn(1 << 29, device="cuda")
    y, times = torch.empty_like(x), []
    for _ in range(6):
        times.append(timed(lambda: y.copy_(x)))
    return 2 * x.nbytes / min(times)


def timed(work) -> float:
    """Seconds of the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def machine() -> dict[str, Any]:
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}


def add_rows(name: str, rows: list[dict[str, Any]], key: tuple[str, ...]) -> None:
    """Into results/NAME_gpu.json; a row takes the place of one of the same `key` from the same machine."""
    found = read_results(name, machine())
    new = {tuple(row[part] for part in key) for row in rows}
    found["rows"] = [row for row in found.get("rows", []) if tuple(row[part] for part in key) not in new] + rows
    write_results(name, found)
