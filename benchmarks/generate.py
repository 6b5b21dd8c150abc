"""How fast is text written on this machine, beside the `rwkv` package, and how near what the machine can do?

    python benchmarks/generate.py                                       # v7 and v6 of 0.1B in fp32 and bf16, int8 and NF4 too
    python benchmarks/generate.py --versions x070 --strategies fp32 --rounds 5

Random weights (L12 D768 V65536), prompts of 100 tokens, 100 new tokens for each. Both read the same checkpoint and go in turns in
one run, the package in a process of its own, which writes one row after the other: it has no batches. `new tokens/s` leaves the
reading of prompts out, `all` counts it in. Sampling is the script's default (top_p 0.3), the package's own function there.
Shares: bytes of weights and states that a step must move, over the machine's reading rate (the sum of 400 MB in float32); and
operations of a step's products, over the rate of a 2048 x 2048 x 2048 product of torch in the same precision.
Prints a table and writes benchmarks/results/generate_cpu.json.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.checkpoint.io import save_checkpoint  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.generation.batch import generate  # noqa: E402
from src.generation.config import Sampling  # noqa: E402
from src.generation.requests import Request  # noqa: E402
from src.model import build_model  # noqa: E402
from src.model.decode import decoder_for  # noqa: E402
from src.quantization.strategy import parse_strategy  # noqa: E402
from src.tokenizer import load_tokenizer  # noqa: E402
from tests.random_checkpoint import make_dimensions, random_weights  # noqa: E402

PROMPT, NEW, VOCABULARY = 100, 100, 65536
PACKAGE = {("x070", "fp32"), ("x070", "bf16"), ("x060", "fp32"), ("x060", "bf16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=["x070", "x060"])
    parser.add_argument("--strategies", nargs="+", default=["fp32", "bf16", "fp32i8", "bf16i8", "bf16nf4"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for version in options.versions:
            dimensions = make_dimensions(version, 12, 768, 64, VOCABULARY)
            path = Path(folder, f"{version}.pth")
            save_checkpoint(random_weights(dimensions), path)
            for strategy in options.strategies:
                rows += compare(version, strategy, dimensions, path, options)
    report(rows)


def compare(version: str, strategy: str, dimensions, path: Path, options: argparse.Namespace) -> list[dict]:
    """The package and each of our batches in turns, `rounds` times."""
    chosen = parse_strategy(f"cpu {strategy}")
    package = Package(path, version, strategy) if (version, strategy) in PACKAGE else None
    model = build_model(random_weights(dimensions), dimensions, chosen.dtype, "cpu", chosen.quantization,
                        quantize_head=chosen.quantization == "int8")
    flops = 2 * sum(x.in_features * x.out_features for x in model.modules() if hasattr(x, "in_features"))
    flops += 2 * sum(x.numel() for name, x in model.named_parameters() if name[-1] in "12" and "att" in name)
    engine, tokenizer = decoder_for(model), load_tokenizer("world", VOCABULARY)
    state = 2 * 4 * dimensions.n_layer * dimensions.n_embd * (dimensions.head_size + 2)  # read and written
    found = {name: [] for name in ["package", *options.batches]}
    reading, multiplying = [], []
    for _ in range(options.rounds):
        reading.append(reading_rate())
        multiplying.append(gemm_rate(chosen.dtype))
        if package:
            found["package"].append(package.run())
        for batch in options.batches:
            found[batch].append(ours(engine, tokenizer, batch))
    if package:
        package.end()
    best = {name: (median(x[0] for x in times), median(x[1] for x in times)) for name, times in found.items() if times}
    rows = []
    for batch in options.batches:
        new, whole = best[batch]
        steps = new / batch
        row = {"version": version, "strategy": strategy, "batch": batch, "new_tokens_per_s": new, "tokens_per_s": whole,
               "read_bytes_per_s": (getattr(engine, "nbytes", 0) + batch * state) * steps, "flops_per_s": flops * new,
               "machine_read_bytes_per_s": median(reading), "machine_flops_per_s": median(multiplying)}
        row |= {"read_share": row["read_bytes_per_s"] / row["machine_read_bytes_per_s"],
                "gemm_share": row["flops_per_s"] / row["machine_flops_per_s"]}
        if package:
            row |= {"package_new_tokens_per_s": best["package"][0], "package_tokens_per_s": best["package"][1],
                    "times_package": new / best["package"][0], "times_package_whole": whole / best["package"][1]}
        rows.append(row)
        print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}), flush=True)
    return rows


def ours(engine, tokenizer, batch: int) -> tuple[float, float]:
    """New tokens a second without and with the reading of prompts, of as many prompts as the batch has rows."""
    generator = torch.Generator().manual_seed(0)
    requests = [Request(row, tuple(torch.randint(1, 65000, (PROMPT,), generator=generator).tolist())) for row in range(batch)]
    marks = []
    started = time.perf_counter()
    for _ in generate(engine, tokenizer, requests, Sampling(max_tokens=NEW, stop=()), 0, batch,
                      lambda drawn: marks.append(time.perf_counter())):
        pass
    return batch * (len(marks) - 1) / (marks[-1] - marks[0]), batch * len(marks) / (marks[-1] - started)


class Package:
    """The `rwkv` package in a process of its own."""

    def __init__(self, path: Path, version: str, strategy: str):
        self._connection, other = multiprocessing.get_context("spawn").Pipe()
        arguments = (path, version, strategy, other)
        multiprocessing.get_context("spawn").Process(target=package_worker, args=arguments, daemon=True).start()
        self._connection.recv()

    def run(self) -> tuple[float, float]:
        self._connection.send("go")
        return self._connection.recv()

    def end(self) -> None:
        self._connection.send("end")


def package_worker(path: Path, version: str, strategy: str, connection) -> None:
    # It reads these when it is imported.
    os.environ.update(RWKV_V7_ON="1" if version == "x070" else "0", RWKV_CUDA_ON="0", RWKV_JIT_ON="1")
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere  # the package tells its settings
        from rwkv.model import RWKV
        from rwkv.utils import PIPELINE

        network = RWKV(model=str(path).removesuffix(".pth"), strategy=f"cpu {strategy}")
        pipeline = PIPELINE.__new__(PIPELINE)
        prompt = torch.randint(1, 65000, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()

        def write(n: int) -> tuple[float, float]:
            started = time.perf_counter()
            out, state = network.forward(prompt, None)
            token = pipeline.sample_logits(out, temperature=1.0, top_p=0.3)
            first = time.perf_counter()
            for _ in range(n - 1):
                out, state = network.forward([token], state)
                token = pipeline.sample_logits(out, temperature=1.0, top_p=0.3)
            ended = time.perf_counter()
            return (n - 1) / (ended - first), n / (ended - started)

        write(10)  # its first calls are compiled
        connection.send("ready")
        while connection.recv() == "go":
            connection.send(write(NEW))


def best_of(work, times: int = 5) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def reading_rate() -> float:
    """Bytes a second."""
    x = torch.ones(100_000_000)
    return x.nbytes / best_of(x.sum)


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations a second."""
    x, y = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / best_of(lambda: x @ y)


def report(rows: list[dict]) -> None:
    table = Table(title=f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ("model", "strategy", "batch", "new tokens/s", "all", "package", "times", "times, all", "of reading", "of GEMM"):
        table.add_column(name, justify="left" if name in ("model", "strategy") else "right")
    for row in rows:
        package = ([f"{row['package_new_tokens_per_s']:.1f}", f"{row['times_package']:.1f}", f"{row['times_package_whole']:.1f}"]
                   if "times_package" in row else ["", "", ""])
        table.add_row(row["version"], row["strategy"], str(row["batch"]), f"{row['new_tokens_per_s']:.1f}",
                      f"{row['tokens_per_s']:.1f}", *package, f"{row['read_share']:.0%}", f"{row['gemm_share']:.0%}")
    Console().print(table)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with atomic_write(results / "generate_cpu.json", "w", encoding="utf-8") as file:
        json.dump({"machine": platform.machine(), "processor": processor(), "threads": torch.get_num_threads(),
                   "torch": torch.__version__, "rows": rows}, file, indent=2)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
