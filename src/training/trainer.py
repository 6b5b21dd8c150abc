"""Lightning's part of a run: its strategy, its callbacks in order, and the fit, in one process for each device."""

import logging
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import ClusterEnvironment

from src.errors import NotFinite
from src.training.batches import PairBatches, TrainingData
from src.training.checkpoint import SealedFile
from src.training.config import TrainConfig
from src.training.inputs import Data
from src.training.loggers import make_loggers
from src.training.metrics import StepMetrics
from src.training.module import PreferenceModule, recorded_objective
from src.training.processes import Others, share_cores, starts_others
from src.training.progress import ProgressBar
from src.training.saving import CheckAdapter, SaveAdapters, explain
from src.training.watching import HeldOut, LinesByEpoch, ReportWriter, Samples


def quiet_lightning() -> None:
    """Silence Lightning's own messages (the devices it found, tips for loggers), which users can't act on."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_callbacks(config: TrainConfig, base: str, version: str, total_steps: int, held_out: Data | None,
                   samples: Samples | None, data: dict[str, Any]) -> tuple[SaveAdapters, list[pl.Callback]]:
    """The callback that saves, and all callbacks in order: what reports an epoch comes after the check of its adapter.

    Args:
        base, version: of the base, its fingerprint and RWKV's version.
        data: what the adapters record of the training data.
    """
    folder = Path(config.run.proj_dir)
    metrics = StepMetrics(folder)
    evaluation = HeldOut(folder, held_out) if held_out else None
    growing: list[LinesByEpoch] = [callback for callback in (evaluation, samples) if callback is not None]
    save = SaveAdapters(folder, base, {"version": version, **recorded_objective(config.objective), **data}, growing)
    bar = ProgressBar(metrics, evaluation, total_steps)
    return save, [metrics, CheckAdapter(), *growing, bar, save, ReportWriter(folder)]


def fit(config: TrainConfig, environment: ClusterEnvironment, module: PreferenceModule, callbacks: list[pl.Callback],
        batches: PairBatches, checkpoint: Path | None, save: SaveAdapters) -> pl.Trainer:
    """Train; raises UserError if training diverged, with the names of the good adapters."""
    plugins: list[Any] = [environment]
    if not config.machine.strategy.startswith("deepspeed"):
        plugins.append(SealedFile())
    others: Others | nullcontext = nullcontext()
    if starts_others(config, environment):
        others = Others(config.machine.devices - 1, environment.main_port)
        callbacks = [others, *callbacks]
    share_cores(config)
    with others:
        trainer = pl.Trainer(
            accelerator=config.machine.accelerator, devices=config.machine.devices, strategy=lightning_strategy(config),
            precision="32-true", max_epochs=config.steps.epoch_count,
            accumulate_grad_batches=config.steps.accumulate_grad_batches,
            gradient_clip_val=config.steps.gradient_clip_val or None, logger=False, callbacks=callbacks, plugins=plugins,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1, log_every_n_steps=1, default_root_dir=config.run.proj_dir,
        )
        # Lightning's own signal handlers exchange messages between the processes, which hangs, and under SLURM they write
        # checkpoints that nothing here resumes from.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.loggers = make_loggers(config) if trainer.is_global_zero else []
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(module, datamodule=TrainingData(batches), ckpt_path=checkpoint, weights_only=True)
        except SystemExit as ended:  # Lightning turns Ctrl-C into it where nothing turns it into Stopped, as in a notebook
            if not isinstance(ended.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        except NotFinite as error:
            raise explain(error, trainer.global_step, save.good, config) from error
    return trainer


def lightning_strategy(config: TrainConfig) -> Any:
    """The strategy's name, or our own DeepSpeed strategy."""
    name = config.machine.strategy
    if not name.startswith("deepspeed"):
        return name
    from src.training.deepspeed import SteppingDeepSpeed

    stage, offload = int(name.removeprefix("deepspeed_stage_")[0]), name.endswith("_offload")
    strategy = SteppingDeepSpeed(stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3)
    assert isinstance(strategy.config, dict)
    strategy.config["train_micro_batch_size_per_gpu"] = config.steps.micro_bsz
    return strategy
