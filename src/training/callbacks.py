"""What happens around the steps: metrics lines, held-out evaluation, progress."""

import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Group
from rich.live import Live
from rich.progress import Progress
from rich.text import Text
from torch import Tensor

from src.console import console, printable, say
from src.errors import NotFinite
from src.preference.loss import pref_percentage
from src.progress import COLUMNS
from src.training.evaluate import evaluate
from src.training.lines import EVAL_FILE, METRICS_FILE, append_line
from src.training.module import PreferenceModule
from src.training.text import evaluate_texts

# Seconds between the lines of a run whose stderr is no terminal: rarer than elsewhere, since runs take hours.
LINE_EVERY = 30.0
AVERAGED = ("sft_loss", "reward_chosen", "reward_rejected", "margin", "pref_accuracy")


class StepMetrics(pl.Callback):
    """One line in metrics.jsonl for each optimizer step, the same to the loggers.

    Means are over the step's pairs (tokens, with texts) and rates count them, both in all processes.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE
        self.pref_percentage = 0.5
        self.before, self.grad_norm, self.lr = 0.0, 0.0, 0.0
        # Of the micro-batches since the last step, where they were computed, and of the step's in all processes, on the host.
        self.sums, self.tokens, self.pairs = 0.0, 0, 0
        self.totals: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"pref_percentage": self.pref_percentage, "elapsed_s": self.last.get("elapsed_s", 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pref_percentage, self.before = state_dict["pref_percentage"], state_dict["elapsed_s"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self.started = self.step_started = time.monotonic()
        self.step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self.step_started = time.monotonic()  # what was evaluated and saved meanwhile is no part of a step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: PreferenceModule, loss: Tensor) -> None:
        losses, share = pl_module.last_losses, pl_module.last_share
        if "margin" in losses:
            losses = losses | {"pref_accuracy": (losses["margin"] > 0).float()}
        self.names = [name for name in ("loss", pl_module.objective.loss_name, *AVERAGED) if name in losses]
        self.sums = self.sums + share * torch.stack([losses[name] for name in self.names]).sum(1, dtype=torch.float64)
        if share:
            self.tokens += pl_module.last_tokens
            self.pairs += len(losses["loss"])

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: PreferenceModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        self.lr = max(group["lr"] for group in optimizer.param_groups)
        sums = torch.cat([self.sums, *(self.sums.new_full((1,), count) for count in (self.tokens, self.pairs))])
        # DeepSpeed keeps gradients to itself; its norm is asked for after the step.
        gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(sums.dtype) if gradients else sums.new_zeros(())
        # The one look of a step at the device's numbers, when all but the optimizer's own work is queued there.
        *sums, self.grad_norm = torch.cat([trainer.strategy.reduce(sums, reduce_op="sum"), norm[None]]).tolist()
        self.totals = dict(zip((*self.names, "tokens", "pairs"), sums, strict=True))
        self.sums, self.tokens, self.pairs = 0.0, 0, 0
        if not math.isfinite(self.totals["loss"]):
            raise NotFinite(f"step {trainer.global_step + 1}: the loss is not finite")
        if not self.grad_norm < float("inf"):
            raise NotFinite(f"step {trainer.global_step + 1}: the gradient is not finite and was not applied")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if isinstance(trainer.strategy, pl.strategies.DeepSpeedStrategy):
            self.grad_norm = float(trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0)
        now = time.monotonic()
        means, preferences = self.totals, {}
        tokens, pairs = means.pop("tokens"), means.pop("pairs")
        if "margin" in means:  # which texts have not
            accuracy = means.pop("pref_accuracy")
            self.pref_percentage = pref_percentage(self.pref_percentage, accuracy)
            preferences = {"pref_percentage": self.pref_percentage, "pref_accuracy": accuracy,
                           "pairs_per_s": pairs / (now - self.step_started)}
        self.last = {
            "step": self.step, **means, **preferences, "lr": self.lr, "grad_norm": self.grad_norm,
            "tokens_per_s": tokens / (now - self.step_started), "peak_memory_bytes": peak_memory(pl_module.device),
            "elapsed_s": self.before + now - self.started,
        }
        self.step_started = now
        wrong = not_finite_numbers(self.last)
        if wrong:
            raise NotFinite(f"step {self.step}: {wrong} not finite")
        if trainer.is_global_zero:
            append_line(self.path, self.last)
            for logger in trainer.loggers:
                logger.log_metrics(self.last, step=self.step)


class HeldOut(pl.Callback):
    """Held-out numbers before the first step and after each epoch: a line each in eval.jsonl, and to the loggers."""

    def __init__(self, folder: Path, pairs: Sequence[tuple]):
        self.path, self.pairs = folder / EVAL_FILE, pairs
        self.last: dict[str, float] = {}
        self.steps: list[int] = []  # of the lines that were written, those before a resume among them

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = list(state_dict["steps"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self._evaluate(trainer, pl_module)

    def _evaluate(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        wrong = None
        if trainer.is_global_zero:
            if pl_module.config.sft:
                numbers = evaluate_texts(pl_module.model, self.pairs)
            else:
                numbers = evaluate(pl_module.model, self.pairs, pl_module.objective)
            wrong = not_finite_numbers(numbers)
            if not wrong:
                self.last = {"step": trainer.global_step, **numbers}
                append_line(self.path, self.last)
                for logger in trainer.loggers:
                    logger.log_metrics({f"eval/{name}": value for name, value in self.last.items()}, step=trainer.global_step)
        wrong = trainer.strategy.broadcast(wrong)  # the others wait here, and stop with the one that evaluates
        if wrong:
            raise NotFinite(f"step {trainer.global_step}: held out, {wrong} not finite")
        self.steps.append(trainer.global_step)


class ProgressBar(pl.Callback):
    """A bar over the whole run on stderr, below it what one watches; where stderr is no terminal, plain lines now and then."""

    def __init__(self, metrics: StepMetrics, held_out: HeldOut | None, total_steps: int):
        self.metrics, self.held_out, self.total_steps = metrics, held_out, total_steps
        # Steps may take minutes, and the time left is to be told all the same.
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
                self._print(f"step {trainer.global_step}/{self.total_steps}: {batch_idx + 1} micro-batches done")
                return
            left = (now - self.started) / done * (self.total_steps - trainer.global_step)
            self._print(f"step {trainer.global_step}/{self.total_steps}, {left:.0f} s left: {self._words()}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if not trainer.is_global_zero:
            return
        epoch = pl_module.config.epoch_begin + trainer.current_epoch + 1
        line = f"epoch {epoch}, step {trainer.global_step}/{self.total_steps}: {self._words()}"
        if self.held_out is not None and self.held_out.last:
            last = self.held_out.last
            line += (f"; held out: accuracy {last['accuracy']:.3f}, margin {last['margin']:+.4f}" if "margin" in last
                     else f"; held out: {last['loss']:.4f} nats a token")
        self._print(line)

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _print(self, line: str) -> None:
        if self.live is not None:
            self.live.console.print(printable(line))
        else:
            say(line)

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()

    def _words(self) -> str:
        last = self.metrics.last
        if not last:
            return ""
        preferences = pairs = ""
        if "margin" in last:
            preferences = f" pref {last['pref_percentage']:.0%} margin {last['margin']:+.4f}"
            pairs = f" {last['pairs_per_s']:.3g} pairs/s"
        return (f"loss {last['loss']:.4f}{preferences}{pairs} {last['tokens_per_s']:.0f} tok/s "
                f"{last['peak_memory_bytes'] / 2**30:.1f} GiB")


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of the process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes_or_bytes * (1 if sys.platform == "darwin" else 1024)


def not_finite_numbers(numbers: dict[str, float]) -> str | None:
    """The names of those that are not, with their verb, such as "loss, margin are"; None where all are finite."""
    names = [name for name, value in numbers.items() if not math.isfinite(value)]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}" if names else None
