"""DeepSpeed under Lightning: optimizer steps where every other strategy has them, and nothing scaled or cast."""

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

# Extensions that DeepSpeed builds for the supported strategies.
DEEPSPEED_BUILDS = ("cpu_adam", "fused_adam", "utils")
LONGEST_BUILD = 600  # seconds


class SteppingDeepSpeed(DeepSpeedStrategy):
    """Lightning's loop, not DeepSpeed's engine, decides which micro-batch ends an optimizer step.

    The engine counts micro-batches across the ends of epochs: it would skip the step with those left over, and take all later
    steps late.
    """

    def __init__(self, **settings: Any):
        super().__init__(precision_plugin=AsItIs("32-true"), **settings)
        remove_dead_locks(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()))
        # DeepSpeed builds its optimizers with the toolkit that torch's builder found.
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
        return nullcontext()  # the boundary decides, and from stage 2 on the engine refuses to skip the exchange


def remove_dead_locks(builds: Path) -> None:
    """Remove locks of killed processes that were building DeepSpeed's extensions; DeepSpeed would wait for them forever.

    Torch's builder keeps its lock file open while it builds. That can't be seen for another user's process, or one in another
    container or on another machine that shares the folder, so a lock also has to be older than any build takes. Without /proc
    nothing is removed.

    Args:
        builds: folder of torch's extension builds.
    """
    locks = [lock for name in DEEPSPEED_BUILDS for pattern in (f"{name}/lock", f"*/{name}/lock") for lock in builds.glob(pattern)]
    if not locks or not Path("/proc/self/fd").exists():
        return
    held = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # another user's, or closed in the meantime
            held.add(os.readlink(link))
    for lock in locks:
        with suppress(FileNotFoundError):  # released in the meantime
            if str(lock.resolve()) not in held and time.time() - lock.stat().st_mtime > LONGEST_BUILD:
                lock.unlink()
                say(f"{lock}: removed, since it is over {LONGEST_BUILD // 60} minutes old and no process holds it")


class AsItIs(DeepSpeedPrecision):
    """Batches and weights keep their precision: trained weights are float32 already."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_module(self, module: Module) -> Module:
        return module

    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # By default the engine divides by the number of accumulated micro-batches, which Lightning has already done.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)
