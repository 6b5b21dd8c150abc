"""Adapters on disk: checked before they are written, and the one record of which are good.

After each epoch `CheckAdapter` runs before anything about that epoch is written, and `SaveAdapters` after every other check has
passed. An adapter in that record has finite values and gives finite losses, on the last micro-batches and on the held-out pairs
or texts if there are any.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.adapters.files import adapter_tensors, save_adapter
from src.checkpoint.io import not_finite
from src.data.packing import TextBatch
from src.errors import NotFinite, UserError
from src.preference.objective import pair_losses, text_losses
from src.run_files import FINAL_FILE, RESUME_FILE, sync_lines
from src.training.checkpoint import RECORD, save_checkpoint
from src.training.config import TrainConfig
from src.training.module import PreferenceModule
from src.training.watching import LinesByEpoch

# The loss of this many last micro-batches is computed again with the adapter after them.
CHECKED_BATCHES = 4
# A message names at most this many good adapters, the last ones.
NAMED = 5


class CheckAdapter(pl.Callback):
    """Stops the run after an epoch whose adapter has, or leads to, numbers that are not finite; runs before all that writes."""

    def __init__(self) -> None:
        self.batches: deque[tuple] = deque(maxlen=CHECKED_BATCHES)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule, outputs: Any, batch: tuple, *_: Any) -> None:
        self.batches.append(batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        with _gathered(trainer, pl_module):
            wrong = not_finite(adapter_tensors(pl_module.model))
        wrong = f"after it, the trained {wrong} are not finite" if wrong else self._lost(pl_module)
        # Each device checks its own micro-batches, and all devices have to stop.
        if not trainer.strategy.reduce_boolean_decision(wrong is None):
            raise NotFinite(f"step {trainer.global_step}: {wrong or 'another device found numbers that are not finite'}")

    @torch.no_grad()
    def _lost(self, pl_module: PreferenceModule) -> str | None:
        model = pl_module.model
        was_training = model.training
        model.eval()
        # A few batches are not worth what compiling them (--compile 1) takes.
        with torch.compiler.set_stance("force_eager" if pl_module.config.steps.compile else "default"):
            losses = [not_finite(_losses(pl_module, batch)) for batch in self.batches]
        model.train(was_training)
        return "after it, the loss of the last micro-batches is not finite" if any(losses) else None


def _losses(pl_module: PreferenceModule, batch: tuple) -> dict[str, Tensor]:
    packed, references, *_ = batch
    if isinstance(packed, TextBatch):
        return text_losses(pl_module.model, packed)
    return pair_losses(pl_module.model, packed, references, pl_module.objective_now())


class SaveAdapters(pl.Callback):
    """Writes the adapter every `epoch_save` epochs and at the end, and with it everything that `--resume 1` needs.

    `good` names the files that were checked and written, including those before a resume.

    Args:
        growing: callbacks whose lines a resumed run counts.
    """

    def __init__(self, folder: Path, base_fingerprint: str, extra: dict[str, Any], growing: Sequence[LinesByEpoch] = ()):
        self.folder, self.base_fingerprint, self.extra, self.growing = folder, base_fingerprint, extra, growing
        self.good: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"good": self.good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.good = list(state_dict["good"])

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: PreferenceModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = self._record(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        done = trainer.current_epoch + 1
        config = pl_module.config
        if done % config.steps.epoch_save == 0 or done == config.steps.epoch_count:
            self._save_adapter(trainer, pl_module, f"rwkv-{config.steps.epoch_begin + done}.safetensors")
            if trainer.is_global_zero:
                sync_lines(self.folder)  # a checkpoint must not survive a power cut that the lines before it don't
            save_checkpoint(trainer, self.folder, self._record(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self._save_adapter(trainer, pl_module, FINAL_FILE)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        # A run that was interrupted after its last checkpoint has nothing left to train when it is resumed.
        if FINAL_FILE not in self.good:
            config = pl_module.config
            for name in (f"rwkv-{config.steps.epoch_begin + config.steps.epoch_count}.safetensors", FINAL_FILE):
                self._save_adapter(trainer, pl_module, name)

    def _record(self, trainer: pl.Trainer) -> dict[str, Any]:
        return {"step": trainer.global_step, "lines": {callback.path.name: list(callback.steps) for callback in self.growing}}

    def _save_adapter(self, trainer: pl.Trainer, pl_module: PreferenceModule, name: str) -> None:
        with _gathered(trainer, pl_module):
            if trainer.is_global_zero:
                save_adapter(pl_module.model, self.folder / name, pl_module.settings, self.base_fingerprint,
                             self.extra | {"step": trainer.global_step})
        self.good = [*(other for other in self.good if other != name), name]


def _gathered(trainer: pl.Trainer, pl_module: PreferenceModule) -> AbstractContextManager[Any]:
    """Gathers whole trained parameters in every process; under DeepSpeed's stage 3 each holds only a part."""
    parameters = list(pl_module.model.parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter for parameter in parameters if parameter.requires_grad])


def explain(error: NotFinite, step: int, good: list[str], config: TrainConfig) -> UserError:
    """One line on what to do about numbers that are not finite, and on which adapters of the run are good.

    Args:
        step: number of optimizer steps done.
        good: the record of `SaveAdapters`.
    """
    if not step:
        files = " and ".join(filter(None, (config.model.load_model, config.model.load_adapter)))
        precision = ", or use --precision fp32" if config.machine.precision != "fp32" else ""
        return UserError(f"{error}; nothing has been trained yet, so check {files} and the data{precision}")
    folder = Path(config.run.proj_dir)
    good = [name for name in good if (folder / name).exists()]
    stopped = f"{error}; training has diverged and was stopped"
    again = "start again in another --proj_dir with a lower --lr_init (or lower rates in the layer profile)"
    if not good:
        return UserError(f"{stopped}, and no checked adapter was saved; check the data, or {again}")
    named = f"{f'{len(good) - NAMED} earlier ones, ' if len(good) > NAMED else ''}{', '.join(good[-NAMED:])}"
    resume = f" --resume 1 would repeat it from {RESUME_FILE}, which is good too." if (folder / RESUME_FILE).exists() else ""
    return UserError(f"{stopped}; checked and good in {folder}: {named}.{resume} Check the data, or {again}, where "
                     f"--load_adapter {folder / good[-1]} continues from the last good one")
