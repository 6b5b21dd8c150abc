"""The recipe of the embedded base model: a small RWKV-7 over bytes, trained on Python's own documentation.

    python example/DPO/train_base.py [--output example/DPO/base_model.pth] [--steps 2800] [--folder out/base]

The official initialization of RWKV-7 (BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py) becomes a checkpoint, which `train.py
--sft 1` then trains in full on plain text, document by document, and `merge.py` writes the result. Neither the example's answers
nor the held-out ones are in the text. Broken off and started again, it goes on.
"""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from example.DPO.corpus import build_corpus  # noqa: E402
from src.checkpoint.dimensions import Dimensions  # noqa: E402
from src.checkpoint.io import save_checkpoint  # noqa: E402
from src.cli.parser import Parser  # noqa: E402
from src.cli.run import run  # noqa: E402
from src.files import atomic_write  # noqa: E402
from src.model import RWKV  # noqa: E402
from src.values import positive  # noqa: E402

DIMENSIONS = Dimensions("x070", n_layer=4, n_embd=192, vocab_size=256, n_head=3, head_size=64, n_ffn=768,
                        ranks=(("a", 32), ("g", 48), ("v", 16), ("w", 32)), dtype=torch.bfloat16)
CONTEXT, BATCH = 320, 8
LR_INIT, LR_FINAL, WARMUP, WEIGHT_DECAY = 2e-3, 5e-5, 200, 0.1
SEED = 0
EPOCH = 200  # steps, after each of which the held-out text is evaluated and everything is saved


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


def write_inputs(folder: Path) -> None:
    """What train.py reads: initial.pth, train.txt and heldout.txt (the last fiftieth, whole documents), profile.csv."""
    torch.manual_seed(SEED)
    weights = initial_model(DIMENSIONS).state_dict()
    save_checkpoint({name: tensor.to(DIMENSIONS.dtype) for name, tensor in weights.items()}, folder / "initial.pth")
    text = build_corpus()
    border = text.index("\0", len(text) - len(text) // 50) + 1
    layers = ("emb", *range(DIMENSIONS.n_layer), "head")
    profile = "Layer,Mode,Weight_lr_init,Weight_lr_final,Weight_decay\n" + "".join(
        f"{layer},full,{LR_INIT},{LR_FINAL},{WEIGHT_DECAY}\n" for layer in layers)
    for name, content in (("train.txt", text[:border]), ("heldout.txt", text[border:]), ("profile.csv", profile)):
        with atomic_write(folder / name) as file:
            file.write(content.encode())


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(ROOT / "example" / "DPO" / "base_model.pth"))
    parser.add_argument("--steps", type=positive, default=2800, help=f"batches of {BATCH * CONTEXT} bytes, in hundreds of two")
    parser.add_argument("--folder", default=str(ROOT / "out" / "base"), help="for the run and what it reads")
    flags = parser.parse_args(arguments)
    folder = Path(flags.folder)
    write_inputs(folder)
    call("train.py", load_model=folder / "initial.pth", sft=1, train_data_file=folder / "train.txt",
         eval_file=folder / "heldout.txt", proj_dir=folder / "run", resume=1, layer_profile=folder / "profile.csv",
         ctx_len=CONTEXT, batch_tokens=BATCH * CONTEXT, epoch_steps=EPOCH, epoch_count=math.ceil(flags.steps / EPOCH),
         warmup_steps=WARMUP, beta1=0.9, beta2=0.99, adam_eps=1e-10, gradient_clip_val=1.0, accelerator="cpu", precision="bf16",
         seed=SEED)
    call("merge.py", base=folder / "initial.pth", adapter=folder / "run" / "rwkv-final.safetensors", output=flags.output)


def call(script: str, **flags: object) -> None:
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    code = subprocess.run([sys.executable, str(ROOT / script), *words], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run(main)
