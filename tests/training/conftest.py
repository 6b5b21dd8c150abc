"""A tiny random model of each version, and pairs prepared for it by the real code."""

from pathlib import Path

import pytest
import torch

from src.checkpoint.io import save_checkpoint
from src.checkpoint.random import make_dimensions, random_weights
from src.preference.config import PrepareConfig
from src.preference.csv import Row, write_pairs_csv
from src.preference.prepare import prepare
from src.training.config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with x060.pth, x070.pth (64 wide: NF4's blocks fit) and pairs.csv (12 rows of unequal lengths)."""
    folder = tmp_path_factory.mktemp("material")
    for version in ("x060", "x070"):
        save_checkpoint(random_weights(make_dimensions(version, 2, 64, 16, 256)), folder / f"{version}.pth")
    write_pairs_csv(folder / "pairs.csv", [Row(f"What is {n} plus {n}?" + " Think." * (n % 3), f"It is {2 * n}.", "No idea" + "!" * n)
                                           for n in range(12)])
    return folder


@pytest.fixture(scope="session")
def prepared(material):
    """`prepared(version, precision, quantization, profile)` -> path of a .save made for them, made once."""
    made: dict[tuple, Path] = {}

    def make(version: str, precision: str = "fp32", quantization: str | None = None, profile: str | None = None) -> Path:
        key = (version, precision, quantization, profile)
        if key not in made:
            made[key] = material / f"{version}-{precision}-{quantization}-{len(made)}.save"
            prepare(PrepareConfig(str(material / f"{version}.pth"), str(material / "pairs.csv"), str(made[key]), None, 512, None, profile,
                                  0, 512, torch.device("cpu"), precision, DTYPES[precision], quantization))
        return made[key]

    return make


@pytest.fixture
def config(material, prepared, tmp_path):
    """`config(**changes)` -> a short run on the CPU."""

    def make(version: str = "x070", **changes) -> TrainConfig:
        values = dict(
            load_model=str(material / f"{version}.pth"), proj_dir=str(tmp_path / "run"), rlhf_train_file=str(prepared(version)),
            rlhf_max_corpus_len=512, eval_file=None, layer_profile="auto", lora_r=4, lora_alpha=8.0, epoch_steps=4, epoch_count=2,
            epoch_begin=0, epoch_save=1, micro_bsz=2, accumulate_grad_batches=1, lr_init=1e-3, lr_final=1e-4, lr_advanced=True,
            warmup_steps=2, beta1=0.9, beta2=0.999, adam_eps=1e-8, gradient_clip_val=1.0, dpo_alpha=0.1, dpo_beta=0.1,
            sft_on_prompt=False, accelerator="cpu", devices=1, precision="fp32", strategy="auto", grad_cp=False, quantization=None,
            wandb="", seed=0, resume=False, allow_reference_mismatch=False,
        )
        return TrainConfig(**values | changes)

    return make
