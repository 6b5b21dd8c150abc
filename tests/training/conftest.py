"""What the tests of this room share: a run that is broken off, a terminal, launchers' variables."""

import os
import re
import threading

import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only

import src.training.module as module
from src.training.config import TrainConfig
from src.training.run import train

# Beginnings of the names of launchers' variables, and of Lightning's.
LAUNCHERS = ("SLURM_", "JSM_", "LSB_", "TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_")


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
