"""How much faster are the chunked forms of the recurrence than the plain steps? Forward and backward, in one run.

    python benchmarks/recurrence.py [--batch 2] [--tokens 512] [--heads 12] [--head_size 64]

Prints a table and writes benchmarks/results/recurrence.json.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.files import atomic_write  # noqa: E402
from src.wkv import wkv6, wkv7  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 2), ("tokens", 512), ("heads", 12), ("head_size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    shape = vars(parser.parse_args())
    rows = []
    for version in ("v6", "v7"):
        inputs = random_inputs(version, *shape.values())
        seconds = {"steps": [], "chunked": []}
        for repeat in range(6):
            for backend in seconds:
                taken = forward_and_backward(version, inputs, backend)
                if repeat:  # the first is a warm-up
                    seconds[backend].append(taken)
        rows.append({"version": version, **{name: median(times) for name, times in seconds.items()},
                     "ratio": median(slow / fast for slow, fast in zip(seconds["steps"], seconds["chunked"], strict=True))})
    table = Table("", "steps, s", "chunked, s", "steps / chunked")
    for row in rows:
        table.add_row(row["version"], f"{row['steps']:.3f}", f"{row['chunked']:.3f}", f"{row['ratio']:.1f}")
    Console().print(table)
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    with atomic_write(ROOT / "benchmarks" / "results" / "recurrence.json", "w", encoding="utf-8") as file:
        json.dump({"machine": machine, "shape": shape, "rows": rows}, file, indent=2)


def random_inputs(version: str, batch: int, tokens: int, heads: int, head_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, decay, k, v, kappa, a = torch.randn(6, batch, tokens, heads, head_size, generator=generator).unbind(0)
    if version == "v6":
        inputs = [r, -decay.exp(), k, v, torch.randn(heads, head_size, generator=generator)]
    else:
        inputs = [r, -0.6 * decay.sigmoid(), k, v, torch.nn.functional.normalize(kappa, dim=-1), a.sigmoid()]
    return [x.detach().requires_grad_() for x in inputs]


def forward_and_backward(version: str, inputs: list[torch.Tensor], backend: str) -> float:
    started = time.perf_counter()
    y, _ = {"v6": wkv6, "v7": wkv7}[version](*inputs, backend=backend)
    torch.autograd.grad(y.sum(), inputs)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
