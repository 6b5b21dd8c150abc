"""A line of metrics for each optimizer step."""

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.errors import NotFinite
from src.preference.kto import by_kind
from src.preference.loss import pref_percentage
from src.run_files import METRICS_FILE, append_line
from src.training.module import PreferenceModule

AVERAGED = ("sft_loss", "reward_chosen", "reward_rejected", "margin", "kl", "desirable", "undesirable", "pref_accuracy")


class StepMetrics(pl.Callback):
    """One line in metrics.jsonl for each optimizer step, sent to the loggers too.

    Means are over the step's pairs (tokens, with texts) and rates count them, in all processes.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE
        self.pref_percentage = 0.5
        self.before = 0.0  # seconds of the run before a resume
        # Sums over this process's micro-batches since the last step, on its device.
        self.sums: Tensor | None = None
        self.tokens, self.pairs = 0, 0
        self.last: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"pref_percentage": self.pref_percentage, "elapsed_s": self.last.get("elapsed_s", 0.0)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pref_percentage, self.before = state_dict["pref_percentage"], state_dict["elapsed_s"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self.started = self.step_started = time.monotonic()
        self.step = trainer.global_step

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self.step_started = time.monotonic()  # evaluating and saving are no part of a step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: PreferenceModule, loss: Tensor) -> None:
        losses, share = pl_module.last_losses, pl_module.last_share
        if "margin" in losses:
            losses = losses | {"pref_accuracy": (losses["margin"] > 0).float()}
        self.names = [name for name in ("loss", pl_module.objective.loss_name, *AVERAGED) if name in losses]
        sums = share * torch.stack([losses[name] for name in self.names]).sum(1, dtype=torch.float64)
        self.sums = sums if self.sums is None else self.sums + sums
        if share:
            self.tokens += pl_module.last_tokens
            self.pairs += len(losses["loss"])

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: PreferenceModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        self.lr = max(group["lr"] for group in optimizer.param_groups)
        assert self.sums is not None  # a backward came before
        sums = torch.cat([self.sums, *(self.sums.new_full((1,), count) for count in (self.tokens, self.pairs))])
        # DeepSpeed hides gradients; it gives their norm after the step.
        gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(sums)
        # A step's only synchronization with the device, when all its work but the optimizer's is queued.
        *totals, self.grad_norm = torch.cat([trainer.strategy.reduce(sums, reduce_op="sum"), norm[None]]).tolist()
        # Over all processes, on the host.
        self.totals = dict(zip((*self.names, "tokens", "pairs"), totals, strict=True))
        self.sums, self.tokens, self.pairs = None, 0, 0
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
        if "desirable" in means:
            means = by_kind(means)
        if "pref_accuracy" in means:  # texts have none
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


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU's allocator, or of the process without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes_or_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes_or_bytes * (1 if sys.platform == "darwin" else 1024)


def not_finite_numbers(numbers: dict[str, float]) -> str | None:
    """The names of the numbers that are not finite, with their verb, such as "loss, margin are"; None if all are finite."""
    names = [name for name, value in numbers.items() if not math.isfinite(value)]
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}" if names else None
