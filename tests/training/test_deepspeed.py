"""DeepSpeed under Lightning, with the engine's place taken: which micro-batch ends a step, and that no number is changed."""

import os
import time
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins import DeepSpeedPrecision
from torch.utils import cpp_extension

from src.data.packing import pack_pairs
from src.data.token_lists import TokenPair
from src.training.deepspeed import AsItIs, SteppingDeepSpeed


@pytest.fixture(autouse=True)
def no_builds(monkeypatch, tmp_path):
    """Extensions of no one else, and torch's without CUDA."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setattr(torch.version, "cuda", None)


class Engine:
    """What DeepSpeed's does with a loss and a boundary, as its documentation has it."""

    accumulate = 4
    boundary = None

    def backward(self, loss, retain_graph=False, scale_wrt_gas=True) -> None:
        (loss / self.accumulate if scale_wrt_gas else loss).backward()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundary = is_boundary


def test_batches_and_weights_keep_their_precision():
    plugin, weights = SteppingDeepSpeed(stage=2).precision_plugin, torch.nn.Linear(2, 2)
    batch = pack_pairs([TokenPair([1], [2], [3])])
    assert isinstance(plugin, DeepSpeedPrecision) and plugin.precision == "32-true"
    assert plugin.convert_input(batch) is batch
    weights = weights.bfloat16()
    assert plugin.convert_module(weights) is weights and weights.weight.dtype == torch.bfloat16


def test_a_loss_that_lightning_has_divided_is_not_divided_again():
    weight = torch.tensor(3.0, requires_grad=True)

    class Model(LightningModule):
        trainer = SimpleNamespace(model=Engine())

    AsItIs("32-true").backward(5 * weight, Model(), None)
    assert weight.grad == 5


@pytest.mark.parametrize("accumulates", [True, False])
def test_lightning_says_which_micro_batch_ends_a_step(accumulates):
    strategy = SteppingDeepSpeed(stage=2)
    fit_loop = SimpleNamespace(_should_accumulate=lambda: accumulates)
    strategy._lightning_module = SimpleNamespace(trainer=SimpleNamespace(fit_loop=fit_loop))
    strategy.model = Engine()
    strategy.on_train_batch_start(None, 0)
    assert strategy.deepspeed_engine.boundary == (not accumulates) and not strategy.handles_gradient_accumulation
    with strategy.block_backward_sync():  # of which the engine would know nothing
        pass


@pytest.mark.parametrize("named", [True, False])
def test_locks_that_would_stop_it_forever_go_first_wherever_torch_builds(tmp_path, monkeypatch, named):
    if not named:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("torch._appdirs.system", "linux2")
    lock = tmp_path / ("builds" if named else "torch_extensions") / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 9999,) * 2)
    SteppingDeepSpeed(stage=2)
    assert not lock.exists()


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_its_optimizers_are_built_with_the_toolkit_of_torch(tmp_path, monkeypatch, cuda):
    for path, text in (("bin/nvcc", "#!/bin/sh\necho release 12.8\n"), ("include/cuda_runtime.h", "")):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "elsewhere")
    SteppingDeepSpeed(stage=2)
    used = cpp_extension.CUDA_HOME
    assert used == (str(tmp_path) if cuda else "elsewhere")
