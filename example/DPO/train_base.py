"""The recipe of the embedded base model: a small RWKV-7 over bytes, trained on Python's own documentation.

    python example/DPO/train_base.py [--output example/DPO/base_model.pth] [--steps 2800]

Plain next-byte prediction with AdamW and a cosine schedule, from the official initialization of RWKV-7
(BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py). Neither the example's answers nor the held-out ones are in the text.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from example.DPO.corpus import build_corpus  # noqa: E402
from src.checkpoint.dimensions import Dimensions  # noqa: E402
from src.checkpoint.io import save_checkpoint  # noqa: E402
from src.model import RWKV  # noqa: E402
from src.progress import progress_bar  # noqa: E402

DIMENSIONS = Dimensions("x070", n_layer=4, n_embd=192, vocab_size=256, n_head=3, head_size=64, n_ffn=768,
                        ranks=(("a", 32), ("g", 48), ("v", 16), ("w", 32)), dtype=torch.bfloat16)
CONTEXT, BATCH = 320, 8
LR_INIT, LR_FINAL, WARMUP, WEIGHT_DECAY = 2e-3, 5e-5, 200, 0.1
SEED = 0


def initial_model(dimensions: Dimensions) -> RWKV:
    """RWKV-7 at its official starting point: outputs zero, decays and mixes spread over channels and depth."""
    # Weights in float32, products in bf16 (what `dtype` names), as the toolkit trains.
    model = RWKV(dimensions, torch.bfloat16)
    width, depth = dimensions.n_embd, dimensions.n_layer
    channel = torch.arange(width) / width
    nn_init = torch.nn.init
    nn_init.uniform_(model.emb.weight, -1e-4, 1e-4)
    nn_init.orthogonal_(model.head.weight, gain=0.5)
    for layer, block in enumerate(model.blocks):
        rising, falling = layer / max(1, depth - 1), 1 - layer / depth
        att, ffn = block.att, block.ffn
        for mix, power in ((att.x_r, 0.2), (att.x_w, 0.9), (att.x_k, 0.7), (att.x_v, 0.7), (att.x_a, 0.9), (att.x_g, 0.2)):
            mix.data[0, 0] = 1 - channel ** (power * falling)
        ffn.x_k.data[0, 0] = 1 - channel ** (falling ** 4)
        att.w0.data[0, 0] = -6.5 + 5 * (torch.arange(width) / (width - 1)) ** (0.85 + rising ** 0.5)
        for name in "wavg":
            if hasattr(att, name + "1"):
                getattr(att, name + "1").data.zero_()
                low_rank = getattr(att, name + "2").data
                nn_init.orthogonal_(low_rank, gain=0.1 * max(1.0, math.sqrt(low_rank.shape[1] / low_rank.shape[0])))
        att.a0.data.zero_()
        if layer > 0:
            att.v0.data.fill_(1.0)
        att.k_k.data.fill_(0.85)
        att.k_a.data.fill_(1.0)
        att.r_k.data.zero_()
        for linear, scale in ((att.receptance, 0.5), (att.key, 0.05), (att.value, 0.5), (ffn.key, 0.5)):
            bound = scale / math.sqrt(width)
            nn_init.uniform_(linear.weight, -bound, bound)
        nn_init.zeros_(att.output.weight)
        nn_init.zeros_(ffn.value.weight)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / "example" / "DPO" / "base_model.pth"))
    parser.add_argument("--steps", type=int, default=2800, help=f"batches of {BATCH} x {CONTEXT} bytes")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    text = torch.tensor(list(build_corpus().encode()), dtype=torch.uint8)
    held_out = len(text) // 50
    train, validation = text[:-held_out], text[-held_out:]
    model = initial_model(DIMENSIONS)
    matrices, others = [], []
    for parameter in model.parameters():
        (matrices if parameter.dim() == 2 and min(parameter.shape) >= 128 else others).append(parameter)
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
                                  lr=LR_INIT, betas=(0.9, 0.99), eps=1e-10, fused=True)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(train) / 1e6:.2f} MB of text, "
          f"{arguments.steps * BATCH * CONTEXT / len(train):.1f} passes over it")

    started, smoothed = time.monotonic(), None
    with progress_bar("batches", arguments.steps) as advance:
        for step in range(arguments.steps):
            rate = LR_FINAL + (LR_INIT - LR_FINAL) * 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
            loss = next_byte_loss(model, train)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
            advance(1, f"loss {smoothed:.3f}")
            if (step + 1) % 200 == 0 or step + 1 == arguments.steps:
                save(model, arguments.output)
                with torch.no_grad():
                    checked = sum(next_byte_loss(model, validation).item() for _ in range(8)) / 8
                print(f"step {step + 1}: training {smoothed:.3f}, validation {checked:.3f} nats a byte, "
                      f"{time.monotonic() - started:.0f} s", flush=True)


def next_byte_loss(model: RWKV, text: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood, in nats a byte, of BATCH windows of CONTEXT bytes drawn anywhere in `text`."""
    starts = torch.randint(0, len(text) - CONTEXT - 1, (BATCH,))
    windows = torch.stack([text[s:s + CONTEXT + 1] for s in starts.tolist()]).long()
    hidden, _ = model(windows[:, :-1].flatten(), torch.arange(0, BATCH * CONTEXT + 1, CONTEXT, dtype=torch.int32))
    return F.cross_entropy(model.logits(hidden), windows[:, 1:].flatten())


def save(model: RWKV, path: str) -> None:
    save_checkpoint({name: tensor.to(DIMENSIONS.dtype) for name, tensor in model.state_dict().items()}, path)


if __name__ == "__main__":
    main()
