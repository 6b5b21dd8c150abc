"""Writing text on a GPU, with random models of released sizes: steps against the memory's floor, and tokens a second in all.

    python benchmarks/gpu/writing.py --size 1.5B --quant none nf4 int8 --rows 1 64 512

A step draws one token for each row and reads it, as a CUDA graph. Its floor: every weight that a step needs read once, every
state read and written once, at the rate of a large copy in the same run. `all` counts prompts of 100 tokens and what the host
does too.
Adds to benchmarks/results/writing_gpu.json.
"""

import argparse
import gc
import time
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import SIZES, VOCABULARY, add_rows, copy_rate, need_a_gpu, random_model, timed

from src.generation.automaton import build_automaton
from src.generation.batch import generate
from src.generation.config import Sampling
from src.generation.graphs import WARM_UPS, Graphs
from src.generation.requests import Request
from src.generation.slots import Slots
from src.generation.vocabulary import read_vocabulary
from src.model.decode import Forward, decoder_for
from src.tokenizer import load_tokenizer

PROMPT, NEW, STEPS = 100, 100, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="1.5B")
    parser.add_argument("--quant", nargs="+", choices=("none", "nf4", "int8"), default=["none", "nf4", "int8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 64, 512])
    options = parser.parse_args()
    need_a_gpu()
    rate = copy_rate()
    table = Table("writing", "rows", "step ms", "floor ms", "of the floor", "steps' tokens/s", "new tokens/s", "all")
    for quant in options.quant:
        model = random_model(options.size, None if quant == "none" else quant, quantize_head=quant == "int8")
        engine = decoder_for(model)
        for rows in options.rows:
            row = {"size": options.size, "quant": quant, "rows": rows} | measure(engine, rows, rate)
            add_rows("writing", [row], ("size", "quant", "rows"))
            table.add_row(f"{options.size} {quant}", str(rows), f"{1e3 * row['step_s']:.2f}", f"{1e3 * row['floor_s']:.2f}",
                          f"{row['floor_s'] / row['step_s']:.0%}", f"{rows / row['step_s']:.0f}",
                          f"{row['new_tokens_per_s']:.0f}", f"{row['tokens_per_s']:.0f}")
        del model, engine
        gc.collect()
        torch.cuda.empty_cache()
    console = Console(width=130)
    console.print(table)
    console.print(f"copies at {rate / 1e12:.2f} TB/s, read and written")


def measure(engine: Forward, rows: int, rate: float) -> dict[str, Any]:
    tokenizer, sampling = load_tokenizer("world", VOCABULARY), Sampling(max_tokens=NEW, stop=())
    vocabulary = read_vocabulary(tokenizer, VOCABULARY, ends=())
    automaton = build_automaton(vocabulary.pieces, vocabulary.banned, (), ())
    seconds = step_seconds(Slots(engine, automaton, vocabulary.weight, sampling, rows), rows, engine.device)
    marks, started = [], time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    requests = [Request(row, tuple(torch.randint(1, 65000, (PROMPT,), generator=generator).tolist())) for row in range(rows)]
    for _ in generate(engine, tokenizer, requests, sampling, 0, rows, lambda drawn: marks.append(time.perf_counter())):
        pass
    # The first steps run as they are, and the capture follows.
    steady = len(marks) // 2
    return {"step_s": seconds, "floor_s": (weight_bytes(engine) + rows * state_bytes(engine)) / rate, "copy_bytes_per_s": rate,
            "new_tokens_per_s": rows * (len(marks) - 1 - steady) / (marks[-1] - marks[steady]),
            "tokens_per_s": rows * len(marks) / (marks[-1] - started)}


@torch.inference_mode()
def step_seconds(slots: Slots, rows: int, device: torch.device) -> float:
    step = Graphs(slots.step, rows, device)
    slots.sampler.enter(0, torch.rand(rows, NEW, dtype=torch.float64))
    for _ in range(WARM_UPS + 2):
        step(rows)
    return median(timed(lambda: step(rows)) for _ in range(STEPS))


def weight_bytes(engine: Forward) -> int:
    """Of all weights but the embedding, of which a step reads a few rows."""
    held = [*engine.model.named_parameters(), *engine.model.named_buffers()]
    return sum(x.nbytes for name, x in held if name != "emb.weight")


def state_bytes(engine: Forward) -> int:
    """Of one row, read and written."""
    state = engine.fresh(1)
    return 2 * sum(x.nbytes for part in (state.att_shift, state.wkv, state.ffn_shift) for x in part)


if __name__ == "__main__":
    main()
