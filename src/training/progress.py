"""A run's progress, on stderr."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.text import Text

from src.console import console, say
from src.progress import COLUMNS
from src.training.metrics import StepMetrics
from src.training.module import PreferenceModule
from src.training.watching import HeldOut

# Seconds between lines where stderr is no terminal: rarer than elsewhere, since runs take hours.
LINE_EVERY = 30.0


class ProgressBar(pl.Callback):
    """A bar for the whole run on stderr, with the latest numbers below it; plain lines now and then if stderr is no terminal."""

    def __init__(self, metrics: StepMetrics, held_out: HeldOut | None, total_steps: int):
        self.metrics, self.held_out, self.total_steps = metrics, held_out, total_steps
        # The time left has to be shown even where a step takes minutes.
        self.bar = Progress(*COLUMNS, speed_estimate_period=3600)
        self.live: Live | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if not trainer.is_global_zero:
            return
        self.first_step, self.started = trainer.global_step, time.monotonic()
        self.line_at = self.started
        self.task = self.bar.add_task("training", total=self.total_steps, completed=trainer.global_step)
        if sys.stderr.isatty():
            self.live = Live(console=console(stderr=True), get_renderable=lambda: Group(self.bar, Text(self._words())))
            self.live.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        self.bar.update(self.task, completed=trainer.global_step)
        now, done = time.monotonic(), trainer.global_step - self.first_step
        if self.live is None and now - self.line_at >= LINE_EVERY:
            self.line_at = now
            if not done:
                say(f"step {trainer.global_step}/{self.total_steps}: {batch_idx + 1} micro-batches done")
                return
            left = (now - self.started) / done * (self.total_steps - trainer.global_step)
            say(f"step {trainer.global_step}/{self.total_steps}, {left:.0f} s left: {self._words()}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if not trainer.is_global_zero:
            return
        epoch = pl_module.config.steps.epoch_begin + trainer.current_epoch + 1
        line = f"epoch {epoch}, step {trainer.global_step}/{self.total_steps}: {self._words()}"
        if self.held_out is not None and self.held_out.last:
            last = self.held_out.last
            margin = f", margin {last['margin']:+.4f}" if "margin" in last else ""
            line += (f"; held out: accuracy {last['accuracy']:.3f}{margin}" if "accuracy" in last
                     else f"; held out: {last['loss']:.4f} nats a token")
        say(line)

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _words(self) -> str:
        last = self.metrics.last
        if not last:
            return ""
        preferences = pairs = ""
        if "pref_percentage" in last:
            margin = f" margin {last['margin']:+.4f}" if "margin" in last else ""
            preferences = f" pref {last['pref_percentage']:.0%}{margin}"
            pairs = f" {last['pairs_per_s']:.3g} pairs/s"
        return (f"loss {last['loss']:.4f}{preferences}{pairs} {last['tokens_per_s']:.0f} tok/s "
                f"{last['peak_memory_bytes'] / 2**30:.1f} GiB")
