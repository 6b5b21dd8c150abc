"""What the tests of this room share: a run that is broken off, a module without one, a terminal, launchers' variables."""

import os
import re
import threading
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only

import src.training.module as module_file
from src.adapters.apply import apply_layer_profile
from src.adapters.layer_profile import auto_layer_profile
from src.model import build_model
from src.training.config import TrainConfig
from src.training.module import PreferenceModule
from src.training.run import train
from tests.random_checkpoint import random_weights
from tests.tiny import tiny_dimensions

# Beginnings of the names of launchers' variables, and of Lightning's.
LAUNCHERS = ("SLURM_", "JSM_", "LSB_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_")


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
def terminal(monkeypatch):
    """Make stderr a pseudo-terminal of so many columns; `terminal(columns)` -> a function that gives what it showed."""
    master, slave = os.openpty()
    stderr, shown = os.fdopen(slave, "w"), []

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                shown.append(data)
        except OSError:  # what Linux makes of the other end's closing
            pass

    reader = threading.Thread(target=read, daemon=True)

    def start(columns: int):
        for name, value in {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm-256color"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stderr", stderr)
        reader.start()

        def text() -> str:
            stderr.close()
            reader.join()
            return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode()).replace("\r", "\n")

        return text

    yield start
    os.close(master)


@pytest.fixture
def given(monkeypatch):
    """`given(variables)` sets them, beside none of another launcher."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.fixture
def module(config, monkeypatch):
    """`module(processes, accumulate, **flags)`: one that trains adapters of two random blocks."""

    def make(processes: int = 1, accumulate: int = 1, **flags) -> PreferenceModule:
        dimensions = tiny_dimensions("x070", 8)
        model = build_model(random_weights(dimensions), dimensions)
        settings = auto_layer_profile(2, 1e-3, 1e-4, rank=4, alpha=8.0)
        apply_layer_profile(model, settings, 0)
        trainer = SimpleNamespace(world_size=processes, accumulate_grad_batches=accumulate)
        monkeypatch.setattr(PreferenceModule, "trainer", trainer)
        return PreferenceModule(model, settings, config(rlhf_train_file="pairs.save", **flags), total_steps=10)

    return make
