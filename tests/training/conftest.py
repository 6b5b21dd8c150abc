"""A run that is broken off, and a module without one."""

from types import SimpleNamespace

import pytest
import torch

import src.training.module as module_file
from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import LayerSetting
from src.model import build_model
from src.training.config import TrainConfig
from src.training.module import PreferenceModule
from src.training.run import train
from tests.random_checkpoint import random_weights
from tests.tiny import tiny_dimensions


@pytest.fixture
def break_off(monkeypatch):
    """`break_off(run, at)`: train until the `at`-th micro-batch, where the plug is pulled."""

    def make(run: TrainConfig, at: int) -> None:
        calls, pair_losses = 0, module_file.pair_losses

        def breaks(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == at:
                raise ConnectionError("the plug was pulled")
            return pair_losses(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(module_file, "pair_losses", breaks)
            with pytest.raises(ConnectionError):
                train(run, {})
        torch.manual_seed(99)  # what another process would start with

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """What they draw depends on no number that others have not, and takes longer than a tiny run."""
    def savefig(_, file, format, **more):
        file.write("<svg/>" if format == "svg" else b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture
def module(config, monkeypatch):
    """`module(processes, accumulate, **flags)`: one that trains adapters of two random blocks."""

    def make(processes: int = 1, accumulate: int = 1, **flags) -> PreferenceModule:
        dimensions = tiny_dimensions("x070", 8)
        model = build_model(random_weights(dimensions), dimensions)
        blocks = [LayerSetting(block, "lora", rank=4, alpha=8, weight_lr_init=1e-3, weight_lr_final=1e-4) for block in ("0", "1")]
        settings = [LayerSetting("emb", "freeze"), *blocks, LayerSetting("head", "freeze")]
        apply_layer_profile(model, settings, 0)
        trainer = SimpleNamespace(world_size=processes, accumulate_grad_batches=accumulate)
        monkeypatch.setattr(PreferenceModule, "trainer", trainer)
        return PreferenceModule(model, settings, config(rlhf_train_file="pairs.save", **flags), total_steps=10)

    return make
