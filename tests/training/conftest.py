"""A short run over the shared tiny material."""

import pytest
import torch

import src.training.module as module
from src.training.config import TrainConfig
from src.training.run import train


@pytest.fixture
def config(material, prepared, tmp_path):
    """`config(**changes)` -> a short run on the CPU."""

    def make(version: str = "x070", **changes) -> TrainConfig:
        values = dict(
            load_model=str(material / f"{version}.pth"), proj_dir=str(tmp_path / "run"),
            rlhf_train_file=changes.get("rlhf_train_file") or str(prepared(version)),
            rlhf_max_corpus_len=512, eval_file=None, layer_profile="auto", lora_r=4, lora_alpha=8.0, epoch_steps=4, epoch_count=2,
            peft="lora", load_adapter=None,
            epoch_begin=0, epoch_save=1, micro_bsz=2, batch_tokens=0, optim="adamw",
            accumulate_grad_batches=1, lr_init=1e-3, lr_final=1e-4, lr_advanced=True,
            warmup_steps=2, beta1=0.9, beta2=0.999, adam_eps=1e-8, gradient_clip_val=1.0, dpo_alpha=0.1, dpo_beta=0.1,
            sft_on_prompt=False, accelerator="cpu", devices=1, precision="fp32", strategy="auto", grad_cp=False,
            compile=False, quantization=None, wandb="", tensorboard=False, samples=0, sample_tokens=8,
            seed=0, resume=False, allow_reference_mismatch=False,
        )
        return TrainConfig(**values | changes)

    return make


@pytest.fixture
def break_off(monkeypatch):
    """`break_off(run, at)`: train until the `at`-th micro-batch, where the plug is pulled."""

    def make(run: TrainConfig, at: int) -> None:
        calls, pair_losses = 0, module.pair_losses

        def breaks(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == at:
                raise ConnectionError("the plug was pulled")
            return pair_losses(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(module, "pair_losses", breaks)
            with pytest.raises(ConnectionError):
                train(run, {})
        torch.manual_seed(99)  # what another process would start with

    return make
