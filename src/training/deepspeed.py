"""DeepSpeed under Lightning, with optimizer steps where every other strategy has them, and nothing scaled or cast on the way."""

import os
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.nn import Module
from torch.utils.cpp_extension import get_default_build_root

from src.console import say
from src.kernels.toolkit import use_toolkit

# Extensions that DeepSpeed builds for the strategies in use.
DEEPSPEED_BUILDS = ("cpu_adam", "fused_adam", "utils")
LONGEST_BUILD = 600  # seconds


class SteppingDeepSpeed(DeepSpeedStrategy):
    """Lightning's loop, not DeepSpeed's engine, decides which micro-batch ends an optimizer step.

    The engine counts micro-batches across epochs' ends, so that the step with those left over would not take place there, and
    all steps after it would come late.
    """

    def __init__(self, **settings: Any):
        super().__init__(precision_plugin=AsItIs("32-true"), **settings)
        remove_dead_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
        # DeepSpeed builds its optimizers with what torch's builder found.
        if torch.version.cuda is not None:
            use_toolkit()

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self.lightning_module is not None  # the fit has begun
        accumulates = self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)

    def block_backward_sync(self) -> AbstractContextManager[None]:
        return nullcontext()  # the boundary says it, and the engine refuses to be told otherwise from stage 2 on


def remove_dead_locks(builds: Path) -> None:
    """Remove the locks that killed processes left when they built DeepSpeed's extensions; it would wait for them for ever.

    Torch's builder makes a file and holds it open while it builds. Its process may be another user's, in another container, or on
    another machine that shares the folder, and is not seen then: a lock goes only once it is older than a build takes as well.
    Where /proc is missing nothing is removed.

    Args:
        builds: folder of torch's extension builds.
    """
    locks = [lock for name in DEEPSPEED_BUILDS for pattern in (f"{name}/lock", f"*/{name}/lock") for lock in builds.glob(pattern)]
    if not locks or not Path("/proc/self/fd").exists():
        return
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # another user's, or gone meanwhile
            held.add(os.readlink(link))
    for lock in locks:
        with suppress(FileNotFoundError):  # given back meanwhile
            if str(lock.resolve()) not in held and time.time() - lock.stat().st_mtime > LONGEST_BUILD:
                lock.unlink()
                say(f"{lock}: removed, since it is over {LONGEST_BUILD // 60} minutes old and no process is seen to build there")


class AsItIs(DeepSpeedPrecision):
    """Batches and weights keep their precision: whatever trains is in float32 already."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_module(self, module: Module) -> Module:
        return module

    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # By default the engine divides by the number of micro-batches that are accumulated, which Lightning has done by then.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)
