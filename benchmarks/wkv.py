"""How fast are the WKV kernels? Forward and backward, beside the PyTorch forms, flash-linear-attention and the memory's floor.

    python benchmarks/wkv.py                      # a GPU where there is one, else the CPU
    python benchmarks/wkv.py --shape 2 512 12 64  # other than the usual shapes: batch, tokens, heads, head size

Prints a table and writes benchmarks/results/wkv_cpu.json or wkv_gpu.json. Ratios are medians over rounds in which every form
runs once, so that a busy machine slows all alike. The floor is each input read and each output written once, 2 bytes an element
(v7: 7 tensors forward and 13 backward; v6: 5 and 9), at the rate of a large copy measured in the same run.
"""

import argparse
import importlib.util
import inspect
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
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]

from shapes import copy_rate  # noqa: E402

from src import kernels  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.wkv import native, wkv6, wkv7  # noqa: E402

GPU_SHAPES = [(2, 2048, 32, 64), (8, 4096, 64, 64), (1, 16384, 64, 64)]
CPU_SHAPES = [(2, 512, 12, 64)]
TENSORS = {"v6": 5 + 9, "v7": 7 + 13}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "T", "H", "N"))
    parser.add_argument("--versions", nargs="+", choices=("v6", "v7"), default=["v6", "v7"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", type=int, choices=(0, 1), default=1, help="0: without flash-linear-attention")
    parser.add_argument("--name", help="of the results' file")
    parser.add_argument("--keep", type=int, choices=(0, 1), default=1, help="0: write no results")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if (reason := kernels.missing(device.type)) is not None:
        parser.error(f"nothing to measure: {reason}")
    shapes = [tuple(options.shape)] if options.shape else GPU_SHAPES if on_gpu else CPU_SHAPES
    rate = copy_rate() if on_gpu else None
    rows = []
    for shape in shapes:
        for version in options.versions:
            forms = gpu_forms(version, shape, options.peers) if on_gpu else cpu_forms(version)
            rows += measure(version, shape, forms, random_inputs(version, *shape, device), options.rounds, rate)
    print_table(rows)
    if not options.keep:
        return
    machine = {"device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
               "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
               "torch": torch.__version__, "bytes_per_second": rate}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    name = "_".join(["wkv", *([options.name] if options.name else []), "gpu" if on_gpu else "cpu"])
    with atomic_write(results / f"{name}.json", "w", encoding="utf-8") as file:
        json.dump({"machine": machine, "rows": rows}, file, indent=2)


def random_inputs(version: str, batch: int, tokens: int, heads: int, head_size: int,
                  device: torch.device) -> dict[str, torch.Tensor]:
    """By name; on a GPU bfloat16, with the decay in float32 as the model has it."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, tokens, heads, head_size)
    r, decay, k, v, kappa, a = (torch.randn(shape, generator=generator, device=device) for _ in range(6))
    if version == "v6":
        inputs = {"r": r, "log_w": -decay.exp(), "k": k, "v": v}
    else:
        inputs = {"r": r, "log_w": -0.6 * decay.sigmoid(), "k": k, "v": v,
                  "kappa": torch.nn.functional.normalize(kappa, dim=-1), "a": a.sigmoid()}
    if device.type == "cuda":
        inputs = {name: x if name == "log_w" else x.bfloat16() for name, x in inputs.items()}
    if version == "v6":
        inputs["u"] = torch.randn(heads, head_size, generator=generator, device=device)
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def cpu_forms(version: str) -> dict:
    run = {"v6": wkv6, "v7": wkv7}[version]
    return {backend: lambda backend=backend, **inputs: run(**inputs, backend=backend)[0]
            for backend in ("native", "chunked", "naive")}


def gpu_forms(version: str, shape: tuple[int, ...], peers: int) -> dict:
    batch, tokens, heads, head_size = shape
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * tokens
    bounds, state = cu_seqlens.cuda(), torch.zeros(batch, heads, head_size, head_size, device="cuda")
    operator = getattr(torch.ops.rwkv_wkv, f"wkv{version[1]}_forward")

    def ours(chunked: bool, u=None, **inputs):
        packed = [x.flatten(0, 1) for x in inputs.values()] + ([] if u is None else [u])
        return operator(*packed, state, cu_seqlens, bounds, native.INTERVAL, chunked, True)[0]

    forms = {"chunked kernel": lambda **inputs: ours(True, **inputs), "sequential kernel": lambda **inputs: ours(False, **inputs)}
    if peers and importlib.util.find_spec("fla") is not None:
        forms["flash-linear-attention"] = fla_v6 if version == "v6" else fla_v7
    return forms


def fla_v6(r, log_w, k, v, u):
    from fla.ops.rwkv6 import chunk_rwkv6

    return chunk_rwkv6(r, k, v, log_w, u, scale=1.0)[0]


def fla_v7(r, log_w, k, v, kappa, a):
    from fla.ops.rwkv7 import chunk_rwkv7

    decay = "log_w" if "log_w" in inspect.signature(chunk_rwkv7).parameters else "w"  # renamed between releases
    return chunk_rwkv7(r=r, k=k, v=v, a=-kappa, b=kappa * a, scale=1.0, **{decay: log_w})[0]


def measure(version: str, shape: tuple[int, ...], forms: dict, inputs: dict[str, torch.Tensor], rounds: int,
            rate: float | None) -> list[dict]:
    seconds = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            taken = timed(form, inputs)
            if turn:  # the first is a warm-up
                seconds[name].append(taken)
    first, rows = next(iter(forms)), []
    for name, times in seconds.items():
        forward, backward = (1e3 * median(x) for x in zip(*times, strict=True))
        row = {"version": version, "shape": shape, "form": name, "forward_ms": forward, "backward_ms": backward,
               "total_ms": 1e3 * median(sum(x) for x in times),
               "over_first": median(sum(x) / sum(y) for x, y in zip(times, seconds[first], strict=True))}
        if rate is not None:
            row["floor_ms"] = 1e3 * TENSORS[version] * 2 * inputs["r"].numel() / rate
            row["over_floor"] = row["total_ms"] / row["floor_ms"]
        rows.append(row)
    return rows


def timed(form, inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of the forward and of the backward."""
    on_gpu, marks = inputs["r"].is_cuda, []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()

    mark()
    y = form(**inputs)
    mark()
    ones = torch.ones_like(y)
    mark()
    torch.autograd.grad(y, list(inputs.values()), ones)
    mark()
    if not on_gpu:
        return marks[1] - marks[0], marks[3] - marks[2]
    torch.cuda.synchronize()
    return marks[0].elapsed_time(marks[1]) / 1e3, marks[2].elapsed_time(marks[3]) / 1e3


def print_table(rows: list[dict]) -> None:
    floor = ["over the floor"] if "over_floor" in rows[0] else []
    table = Table("", "B, T, H, N", "form", "forward, ms", "backward, ms", "both, ms", "over the first", *floor)
    for row in rows:
        numbers = [f"{row[name]:.2f}" for name in ("forward_ms", "backward_ms", "total_ms")]
        ratios = [f"{row[name]:.1f}" for name in ("over_first", "over_floor") if name in row]
        table.add_row(row["version"], ", ".join(map(str, row["shape"])), row["form"], *numbers, *ratios)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
