"""What a run writes about its model before the first step and after each epoch: held-out numbers, samples, the report."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from src.console import say
from src.errors import NotFinite, Stopped, UserError
from src.evaluation.held_out import evaluate_pairs, evaluate_texts
from src.evaluation.report import write_report
from src.evaluation.samples import Answer, Questions
from src.run_files import EVAL_FILE, METRICS_FILE, SAMPLES_FILE, append_line
from src.training.inputs import Data
from src.training.metrics import not_finite_numbers
from src.training.module import PreferenceModule


class LinesByEpoch(pl.Callback):
    """Writes a line to a file of the run before the first step and after each epoch. `steps` has the steps of all lines written,
    including those before a resume."""

    def __init__(self, path: Path):
        self.path = path
        self.steps: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = list(state_dict["steps"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if trainer.global_step == 0:
            self._add(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self._add(trainer, pl_module)

    def _add(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        # The other processes wait for the one that writes, and stop with it.
        if wrong := trainer.strategy.broadcast(self.write(trainer, pl_module) if trainer.is_global_zero else None):
            raise NotFinite(f"step {trainer.global_step}: {wrong}")
        self.steps.append(trainer.global_step)

    def write(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> str | None:
        """Write the line. If its numbers are not finite, write nothing and return which."""
        raise NotImplementedError


class HeldOut(LinesByEpoch):
    """Held-out numbers: a line each time in eval.jsonl, sent to the loggers too."""

    def __init__(self, folder: Path, data: Data):
        super().__init__(folder / EVAL_FILE)
        self.data = data
        self.last: dict[str, float] = {}

    def write(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> str | None:
        if pl_module.config.objective.sft:
            numbers = evaluate_texts(pl_module.model, self.data.texts)
        else:
            numbers = evaluate_pairs(pl_module.model, self.data.pairs, pl_module.objective)
        if wrong := not_finite_numbers(numbers):
            return f"held out, {wrong} not finite"
        self.last = {"step": trainer.global_step, **numbers}
        append_line(self.path, self.last)
        for logger in trainer.loggers:
            logger.log_metrics({f"eval/{name}": value for name, value in self.last.items()}, step=trainer.global_step)
        return None


class Samples(LinesByEpoch):
    """A line each time in samples.jsonl: the step, and for each prompt its text, the chosen answer and the model's."""

    def __init__(self, folder: Path, questions: Questions, answer: Answer, max_tokens: int):
        super().__init__(folder / SAMPLES_FILE)
        self.questions, self.answer, self.max_tokens = questions, answer, max_tokens

    def write(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> str | None:
        tokenizer, tokens, texts, ending = self.questions
        try:
            # A few token-by-token steps are not worth compiling (--compile 1).
            with torch.compiler.set_stance("force_eager" if pl_module.config.steps.compile else "default"):
                answers = self.answer(pl_module.model, tokenizer, tokens, self.max_tokens, ending)
        except NotFinite:
            return "the logits of the samples' answers are not finite"
        samples = [{**text, "answer": answer, "complete": complete}
                   for text, (answer, complete) in zip(texts, answers, strict=True)]
        append_line(self.path, {"step": trainer.global_step, "samples": samples})
        return None


class ReportWriter(pl.Callback):
    """Writes report.html after each epoch except the last (`finish` writes that one) and where a signal or Ctrl-C ends the run.

    A report that can't be written costs a warning and does not stop training.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if trainer.current_epoch + 1 < pl_module.config.steps.epoch_count:
            self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: PreferenceModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped | KeyboardInterrupt) and (self.folder / METRICS_FILE).exists():
            self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if trainer.is_global_zero:
            try:
                write_report(self.folder)
            except UserError as error:
                say(f"warning: {error}")
