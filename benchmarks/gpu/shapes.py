"""Models of the released sizes with random weights, drawn on the GPU without a file, and what the GPU itself can do."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from src.checkpoint.dimensions import Dimensions  # noqa: E402
from src.checkpoint.random import RandomWeights, make_dimensions  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.model import RWKV, build_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
VOCABULARY = 65536
# version, blocks, width
SIZES = {"0.1B": ("x070", 12, 768), "0.4B": ("x070", 24, 1024), "1.5B": ("x070", 24, 2048), "2.9B": ("x070", 32, 2560),
         "7.2B": ("x070", 32, 4096), "1.6B v6": ("x060", 24, 2048), "7B v6": ("x060", 32, 4096)}


def need_a_gpu() -> None:
    if not torch.cuda.is_available():
        print("nothing to measure: torch finds no GPU here", file=sys.stderr)
        raise SystemExit(2)


def dimensions_of(size: str) -> Dimensions:
    version, n_layer, n_embd = SIZES[size]
    return make_dimensions(version, n_layer, n_embd, 64, VOCABULARY)


def random_model(size: str, quantize: str | None, quantize_head: bool = False) -> RWKV:
    """In bfloat16, on the GPU."""
    dimensions = dimensions_of(size)
    weights = RandomWeights(dimensions, dtype=torch.bfloat16, device="cuda")
    return build_model(weights, dimensions, torch.bfloat16, "cuda", quantize, quantize_head=quantize_head)


def copy_rate() -> float:
    """Bytes read and written a second by copies of 2 GB."""
    x = torch.randn(1 << 29, device="cuda")
    y, times = torch.empty_like(x), []
    for _ in range(6):
        times.append(timed(lambda: y.copy_(x)))
    return 2 * x.nbytes / min(times)


def product_rate() -> float:
    """Operations a second of 8192 x 8192 x 8192 products in bfloat16."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / min(timed(lambda: x @ y) for _ in range(6))


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
    path, found = RESULTS / f"{name}_gpu.json", {"machine": machine(), "rows": []}
    if path.exists() and (before := json.loads(path.read_text()))["machine"] == found["machine"]:
        found = before
    new = {tuple(row[part] for part in key) for row in rows}
    found["rows"] = [row for row in found["rows"] if tuple(row[part] for part in key) not in new] + rows
    RESULTS.mkdir(exist_ok=True)
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=2)
