"""How much of a training step on the CPU is the recurrence? A DPO step of a random RWKV-7 0.1B with LoRA, profiled.

    python benchmarks/wkv_share.py [--steps 3]

Prints the share of the step's time spent in the WKV operators, by torch's profiler, and writes benchmarks/results/wkv_share.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src import kernels  # noqa: E402
from src.adapters.apply import apply_layer_profile  # noqa: E402
from src.adapters.layer_profile import auto_layer_profile  # noqa: E402
from src.data.packing import pack_pairs  # noqa: E402
from src.data.token_lists import TokenPair  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.model import build_model  # noqa: E402
from src.preference.objective import Objective, pair_losses  # noqa: E402
from tests.random_checkpoint import make_dimensions, random_weights  # noqa: E402

PROMPT, ANSWER = 300, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if (reason := kernels.missing("cpu")) is not None:
        parser.error(f"nothing to measure: {reason}")
    dimensions = make_dimensions("x070", n_layer=12, n_embd=768, head_size=64, vocab_size=65536)
    model = build_model(random_weights(dimensions), dimensions)
    apply_layer_profile(model, auto_layer_profile(12, 1e-4, 1e-5, rank=16), seed=0)
    generator = torch.Generator().manual_seed(0)
    prompt, chosen, reject = (torch.randint(1, 65536, (n,), generator=generator).tolist() for n in (PROMPT, ANSWER, ANSWER))
    batch = pack_pairs([TokenPair(prompt, chosen, reject)])
    steps = []
    for step in range(options.steps + 1):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            started = time.perf_counter()
            pair_losses(model, batch, [(0.0, 0.0)], Objective({"beta": 0.1}, alpha=0.1))["loss"].mean().backward()
            taken = time.perf_counter() - started
        recurrence = sum(event.cpu_time_total for event in found.key_averages() if event.key.startswith("rwkv_wkv::")) / 1e6
        if step:  # the first is a warm-up
            steps.append({"step_s": taken, "wkv_s": recurrence, "share": recurrence / taken})
            print(f"step {taken:.2f} s, recurrence {recurrence:.3f} s, {100 * recurrence / taken:.1f} %")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with atomic_write(results / "wkv_share.json", "w", encoding="utf-8") as file:
        found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "tokens": len(batch.tokens), "steps": steps}
        json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
