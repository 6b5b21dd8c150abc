"""How much of a training step on the CPU is the recurrence? A DPO step of a random RWKV-7 0.1B with LoRA, profiled.

    python benchmarks/wkv_share.py [--backend native|chunked] [--steps 3]

Prints the share of the step's time spent in the WKV forward and backward and writes benchmarks/results/wkv_share.json.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src import wkv  # noqa: E402
from src.adapters.apply import apply_layer_profile  # noqa: E402
from src.adapters.layer_profile import auto_layer_profile  # noqa: E402
from src.checkpoint.random import make_dimensions, random_weights  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.model import build_model, rwkv7  # noqa: E402
from src.preference.packing import pack_pairs  # noqa: E402
from src.training.objective import Objective, pair_losses  # noqa: E402

PROMPT, ANSWER = 300, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("native", "chunked"), default="native")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    dimensions = make_dimensions("x070", n_layer=12, n_embd=768, head_size=64, vocab_size=65536)
    model = build_model(random_weights(dimensions), dimensions)
    apply_layer_profile(model, auto_layer_profile(12, 1e-4, 1e-5, rank=16), seed=0)
    generator = torch.Generator().manual_seed(0)
    prompt, chosen, reject = (torch.randint(1, 65536, (n,), generator=generator).tolist() for n in (PROMPT, ANSWER, ANSWER))
    batch = pack_pairs([(prompt, chosen, reject, 0.0, 0.0)])
    clock = Clock(options.backend)
    steps = []
    with mock.patch.object(rwkv7, "wkv7", clock.wkv7):
        for step in range(options.steps + 1):
            clock.seconds, started = 0.0, time.perf_counter()
            pair_losses(model, batch, [(0.0, 0.0)], Objective(beta=0.1, alpha=0.1))["loss"].mean().backward()
            taken = time.perf_counter() - started
            if step:  # the first is a warm-up
                steps.append({"step_s": taken, "wkv_s": clock.seconds, "share": clock.seconds / taken})
                print(f"step {taken:.2f} s, recurrence {clock.seconds:.3f} s, {100 * clock.seconds / taken:.1f} %")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with atomic_write(results / "wkv_share.json", "w", encoding="utf-8") as file:
        json.dump({"backend": options.backend, "threads": torch.get_num_threads(), "torch": torch.__version__,
                   "tokens": batch.tokens.numel(), "steps": steps}, file, indent=2)


class Clock:
    """Stands in for the model's wkv7 and adds up what its forward and backward take."""

    def __init__(self, backend: str):
        self.backend, self.seconds = backend, 0.0

    def wkv7(self, *inputs):
        *tensors, cu_seqlens = inputs
        inside = [x.detach().requires_grad_(x.requires_grad) for x in tensors]
        started = time.perf_counter()
        with torch.enable_grad():
            outputs = wkv.wkv7(*inside, cu_seqlens, self.backend)
        self.seconds += time.perf_counter() - started
        return _Timed.apply(self, inside, outputs, *tensors)


class _Timed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, clock, inside, outputs, *tensors):
        ctx.clock, ctx.inside, ctx.outputs = clock, inside, outputs
        return tuple(x.detach() for x in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        wanted = [x for x in ctx.inside if x.requires_grad]
        started = time.perf_counter()
        found = iter(torch.autograd.grad(ctx.outputs, wanted, gradients, allow_unused=True))
        ctx.clock.seconds += time.perf_counter() - started
        return None, None, None, *(next(found) if x.requires_grad else None for x in ctx.inside)


if __name__ == "__main__":
    main()
