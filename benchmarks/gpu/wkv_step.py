"""The recurrence's step kernels, one token of each row, against the memory's rate.

    python benchmarks/gpu/wkv_step.py                                             # a table
    ncu --kernel-name regex:step python benchmarks/gpu/wkv_step.py --once 1       # one launch, for a profiler

The steps of 24 layers in turn, as one CUDA graph; the state is read and written once, and that is nearly all. A few rows'
states stay in the GPU's cache from one replay to the next, as they do while text is written. Adds to
benchmarks/results/wkv_step_gpu.json.
"""

import argparse
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from shapes import add_rows, copy_rate, need_a_gpu, timed

from src import kernels
from src.wkv import wkv6_step, wkv7_step

LAYERS, HEAD_SIZE = 24, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", type=int, choices=(0, 1), default=0, help="1: one launch each at 512 rows, nothing timed")
    options = parser.parse_args()
    need_a_gpu()
    if (reason := kernels.missing("cuda")) is not None:
        parser.error(f"nothing to measure: {reason}")
    if options.once:
        for version in ("v6", "v7"):
            step_of(version, 512, 32, layers=1)()
        torch.cuda.synchronize()
        return
    rate, rows, table = copy_rate(), [], Table("", "rows", "heads", "us a step", "of the copy's rate")
    for version in ("v6", "v7"):
        for n_rows, heads in ((1, 32), (64, 32), (512, 32), (512, 64)):
            step = step_of(version, n_rows, heads, LAYERS)
            for _ in range(2):
                step()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            seconds = median(timed(graph.replay) for _ in range(20)) / LAYERS
            share = 2 * n_rows * heads * HEAD_SIZE**2 * 4 / seconds / rate
            rows.append({"version": version, "rows": n_rows, "heads": heads, "seconds": seconds, "share_of_copy_rate": share})
            table.add_row(version, str(n_rows), str(heads), f"{1e6 * seconds:.1f}", f"{share:.0%}")
    Console(width=120).print(table)
    add_rows("wkv_step", rows, ("version", "rows", "heads"))


def step_of(version: str, rows: int, heads: int, layers: int):
    """A function that takes one step in each of `layers` states."""
    generator = torch.Generator("cuda").manual_seed(0)
    r, decay, k, v, kappa, a = torch.randn(6, rows, heads, HEAD_SIZE, generator=generator, device="cuda")
    states = torch.randn(layers, rows, heads, HEAD_SIZE, HEAD_SIZE, generator=generator, device="cuda")
    r, k, v = (x.bfloat16() for x in (r, k, v))
    if version == "v6":
        u, log_w = torch.randn(heads, HEAD_SIZE, generator=generator, device="cuda"), -decay.exp()
        return lambda: [wkv6_step(r, log_w, k, v, u, state=state) for state in states]
    log_w, kappa = -0.6 * decay.sigmoid(), torch.nn.functional.normalize(kappa, dim=-1).bfloat16()
    a = a.sigmoid().bfloat16()
    return lambda: [wkv7_step(r, log_w, k, v, kappa, a, state=state) for state in states]


if __name__ == "__main__":
    main()
