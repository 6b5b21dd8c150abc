"""DeepSpeed under Lightning, with optimizer steps where every other strategy has them, and nothing scaled or cast on the way."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.plugins import DeepSpeedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.nn import Module

from src.wkv.toolkit import use_toolkit


class SteppingDeepSpeed(DeepSpeedStrategy):
    """Lightning's loop, not DeepSpeed's engine, decides which micro-batch ends an optimizer step.

    The engine counts micro-batches across epochs' ends, so that the step with those left over would not take place there, and
    all steps after it would come late.
    """

    def __init__(self, **settings: Any):
        super().__init__(precision_plugin=AsItIs("32-true"), **settings)
        # DeepSpeed builds its optimizers with what torch's builder found.
        if torch.version.cuda is not None:
            use_toolkit()

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        accumulates = self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)

    def block_backward_sync(self) -> AbstractContextManager[None]:
        return nullcontext()  # the boundary says it, and the engine refuses to be told otherwise from stage 2 on


class AsItIs(DeepSpeedPrecision):
    """Batches and weights keep their precision: whatever trains is in float32 already."""

    def convert_input(self, data: Any) -> Any:
        return data

    def convert_module(self, module: Module) -> Module:
        return module

    def backward(self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # By default the engine divides by the number of micro-batches that are accumulated, which Lightning has done by then.
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)
