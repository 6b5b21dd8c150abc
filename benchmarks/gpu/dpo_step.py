"""A DPO step on a GPU, on a random model of a released size: seconds, how busy the GPU is, and memory against its count.

    python benchmarks/gpu/dpo_step.py --size 1.5B                       # NF4, LoRA of rank 16, 4,096 tokens
    python benchmarks/gpu/dpo_step.py --size 7.2B --tokens 4096 2048 --grad_cp 0 1

A step is what train.py does on one micro-batch: forward, backward, clipping, AdamW; pairs of a prompt of 512 tokens and answers
of 256 each, moved from the host. `device` is the time of all kernels by torch's profiler, `busy` its share of a step's time
without the profiler. Adds to benchmarks/results/dpo_step_gpu.json.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import SIZES, VOCABULARY, add_rows, need_a_gpu, random_model

from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import auto_layer_profile
from src.data.packing import pack_pairs
from src.data.token_lists import TokenPair
from src.model import RWKV
from src.preference.objective import Objective, pair_losses

RANK, PROMPT, ANSWER = 16, 512, 256
WARM_UPS, STEPS = 3, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1.5B")
    parser.add_argument("--quant", choices=("none", "nf4", "int8"), default="nf4")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help=f"of a step, in pairs of {PROMPT + 2 * ANSWER}")
    parser.add_argument("--grad_cp", type=int, nargs="+", choices=(0, 1), default=[0], help="with each of --tokens")
    parser.add_argument("--compile", type=int, choices=(0, 1), default=0)
    parser.add_argument("--keep", type=int, choices=(0, 1), default=1, help="0: add nothing to the results")
    options = parser.parse_args()
    need_a_gpu()
    torch.set_num_threads(4)
    model = random_model(options.size, None if options.quant == "none" else options.quant)
    apply_layer_profile(model, auto_layer_profile(len(model.blocks), 1e-4, 1e-5, rank=RANK), seed=0)
    if options.compile:
        for block in model.blocks:
            block.att.compile(dynamic=True)
            block.ffn.compile(dynamic=True)
    rows, steps = [], []
    for tokens, grad_cp in zip(options.tokens, options.grad_cp, strict=True):
        row = {"size": options.size, "quant": options.quant, "tokens": tokens, "grad_cp": grad_cp, "compile": options.compile}
        steps.append(step_of(model, tokens // (PROMPT + 2 * ANSWER), bool(grad_cp)))
        rows.append(row | timing(steps[-1]) | {"counted_bytes": counted_bytes(model, tokens) if grad_cp else None})
    # Launches stay slower once a profiler has run in a process, so that comes last.
    for row, step in zip(rows, steps, strict=True):
        row |= kernels_of(step)
        row["busy"] = row["device_s"] / row["step_s"]
        report(row)
    if options.keep:
        add_rows("dpo_step", rows, ("size", "quant", "tokens", "grad_cp", "compile"))


def step_of(model: RWKV, n_pairs: int, grad_cp: bool) -> Callable[[], None]:
    """A function that takes a whole optimizer step."""
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    objective, generator = Objective({"beta": 0.1}, alpha=0.1), torch.Generator().manual_seed(0)
    pairs = [TokenPair(*(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in (PROMPT, ANSWER, ANSWER)))
             for _ in range(n_pairs)]
    references = torch.full((n_pairs, 2), -1e3, dtype=torch.float64).pin_memory()

    def step() -> None:
        packed = pack_pairs(pairs).pin_memory().to("cuda")
        losses = pair_losses(model, packed, references.to("cuda", non_blocking=True), objective, grad_cp)
        losses["loss"].mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timing(step: Callable[[], None]) -> dict[str, Any]:
    """Seconds of a step, of the host's part of it, and of the first; and bytes held before it and at its peak."""
    host, whole = [], []
    for number in range(WARM_UPS + STEPS):
        if number == WARM_UPS:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        started = time.perf_counter()
        step()
        host.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - started)
    return {"step_s": median(whole[WARM_UPS:]), "host_s": median(host[WARM_UPS:]), "first_step_s": whole[0],
            "held_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated()}


def kernels_of(step: Callable[[], None]) -> dict[str, Any]:
    """What a step launches on the GPU, and how long that takes there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    return {"device_s": sum(event.self_device_time_total for event in kernels) / 1e6,
            "launches": sum(event.count for event in kernels),
            "kernels": [{"name": event.key[:100], "ms": event.self_device_time_total / 1e3, "launches": event.count}
                        for event in kernels[:25]]}


def trained_parameters(model: RWKV) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def counted_bytes(model: RWKV, tokens: int) -> float:
    """What --grad_cp 1 must hold: weights, adapters with gradient and two moments, what blocks keep, and one block made again."""
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers())) + sum(3 * x.nbytes for x in trained_parameters(model))
    bf16, fp32 = 2, 4
    # A block keeps its input in float32 and r, k, v and the outputs of both halves. One block made again holds 30 vectors a token
    # in bf16, the FFN's 4 in three copies, and the recurrence's states, 64 wide for each 16 tokens, in float32.
    kept = len(model.blocks) * (fp32 + 5 * bf16)
    again = (30 + 12) * bf16 + 64 / 16 * fp32
    return held + tokens * model.dimensions.n_embd * (kept + again)


def report(row: dict[str, Any]) -> None:
    table = Table("DPO step", "ms", "host ms", "device ms", "busy", "launches", "peak GB", "counted GB", "tokens/s")
    name = f"{row['size']} {row['quant']}, {row['tokens']} tokens" + ", grad_cp" * row["grad_cp"] + ", compile" * row["compile"]
    counted = f"{row['counted_bytes'] / 1e9:.2f}" if row["counted_bytes"] else ""
    table.add_row(name, *(f"{1e3 * row[part]:.1f}" for part in ("step_s", "host_s", "device_s")), f"{row['busy']:.0%}",
                  f"{row['launches']:.0f}", f"{row['peak_bytes'] / 1e9:.2f}", counted, f"{row['tokens'] / row['step_s']:.0f}")
    console = Console(width=130)
    console.print(table)
    console.print(f"first step {row['first_step_s']:.1f} s; the longest kernels, ms a step:")
    for kernel in row["kernels"][:8]:
        console.print(f"  {kernel['ms']:7.2f}  x{kernel['launches']:<6.0f} {kernel['name'][:95]}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
