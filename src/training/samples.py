"""What the model answers to a few of the pairs' prompts, before the first step and after each epoch."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from src.console import say
from src.errors import NotFinite, UserError
from src.model import RWKV
from src.preference.pairs import Pair
from src.tokenizer import Tokenizer, load_tokenizer
from src.training.lines import SAMPLES_FILE, append_line
from src.training.module import PreferenceModule

# (model, tokenizer, prompts' tokens, most tokens of an answer) -> each answer's text, and whether it came to its end.
Answer = Callable[[RWKV, Tokenizer, Sequence[list[int]], int], list[tuple[str, bool]]]


class Questions(NamedTuple):
    """Prompts to be answered, as tokens and with their own and the chosen answers' texts."""

    tokenizer: Tokenizer
    tokens: list[list[int]]
    texts: list[dict[str, str]]  # "prompt" and "chosen"


def read_questions(pairs: Sequence[Pair], count: int, sidecar: dict[str, Any] | None, vocab_size: int) -> Questions | None:
    """The first `count` pairs whose prompts differ, by the tokenizer that the sidecar names, or else the vocabulary's.

    None, and a line that says so, where that tokenizer is not to be had or is not that of the pairs.
    """
    first: dict[tuple[int, ...], Pair] = {}
    for pair in pairs:
        if len(first) < count:
            first.setdefault(tuple(pair[0]), pair)
    name = (sidecar or {}).get("tokenizer")
    try:
        tokenizer = load_tokenizer(name if isinstance(name, str) else None, vocab_size)
        texts = [{"prompt": tokenizer.decode(pair[0]).strip(), "chosen": tokenizer.decode(pair[1]).strip()}
                 for pair in first.values()]
    except UserError as error:
        say(f"warning: no samples in the report, for want of the pairs' tokenizer: {error}")
        return None
    return Questions(tokenizer, [pair[0] for pair in first.values()], texts)


class Samples(pl.Callback):
    """A line each time in samples.jsonl: the step, and for each prompt its text, the chosen answer and the model's."""

    def __init__(self, folder: Path, questions: Questions, answer: Answer, max_tokens: int):
        self.path, self.questions, self.answer, self.max_tokens = folder / SAMPLES_FILE, questions, answer, max_tokens
        self.steps: list[int] = []  # of the lines that were written, those before a resume among them

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = list(state_dict["steps"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        if trainer.global_step == 0:
            self._write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: PreferenceModule) -> None:
        finite = True
        if trainer.is_global_zero:
            tokenizer, tokens, texts = self.questions
            try:
                # A few steps token by token are not worth what compiling them (--compile 1) takes.
                with torch.compiler.set_stance("force_eager" if pl_module.config.compile else "default"):
                    answers = self.answer(pl_module.model, tokenizer, tokens, self.max_tokens)
            except NotFinite:
                finite = False
            else:
                samples = [{**text, "answer": answer, "complete": complete}
                           for text, (answer, complete) in zip(texts, answers, strict=True)]
                append_line(self.path, {"step": trainer.global_step, "samples": samples})
        if not trainer.strategy.broadcast(finite):  # the others wait here, and stop with the one that writes
            raise NotFinite(f"step {trainer.global_step}: the logits that answer the samples' prompts are not finite")
        self.steps.append(trainer.global_step)
