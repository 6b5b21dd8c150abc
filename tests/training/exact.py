"""Losses and their gradients in float64, one answer or text at a time, from the formulas; and what a real run did instead."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import src.training.data as data
from src.checkpoint.dimensions import read_dimensions
from src.checkpoint.io import load_checkpoint
from src.model import build_model
from src.preference.pairs import load_pairs
from src.training.config import TrainConfig
from src.training.module import PreferenceModule
from src.training.run import train
from tests.preference.test_losses import formula

ALPHA, BETA = 0.3, 0.2


def save_pairs(source: Path, path: Path, count: int = 5) -> Path:
    """Pairs of unequal lengths, with references some nats off, so that each pair has a margin and a gradient of its own."""
    pairs = load_pairs(source, 256, 512)[0][:count]
    torch.save([(*pair[:3], pair[3] - 3.0 + 4 * number, pair[4] + number) for number, pair in enumerate(pairs)], path)
    return path


class Exact:
    """A checkpoint in float64; gradients are those of the blocks' parameters, as one vector."""

    def __init__(self, checkpoint: Path):
        weights = load_checkpoint(checkpoint)
        self.model = build_model(weights, read_dimensions(weights, str(checkpoint)), torch.float64)
        self.parameters = {name: parameter.requires_grad_() for name, parameter in self.model.named_parameters()
                           if name.startswith("blocks.")}

    def log_probs(self, tokens: Sequence[int]) -> Tensor:
        """log p of each token after the first, given those before it."""
        logits = self.model.logits(self.model(torch.tensor(tokens[:-1]))[0])
        return torch.log_softmax(logits, -1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]

    def gradient(self, value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, list(self.parameters.values()), retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(parameter) if gradient is None else gradient).flatten()
                          for parameter, gradient in zip(self.parameters.values(), found, strict=True)])

    def pair(self, pair: tuple, loss: str = "dpo", beta: float = BETA, gamma: float = 0.0, smoothing: float = 0.0,
             alpha: float = ALPHA) -> tuple[float, Tensor]:
        """The objective of one pair and its gradient: the published loss, differentiated in the two log-probabilities by central
        differences (which err by 1e-8), plus alpha times the mean negative log-likelihood of the chosen tokens."""
        prompt, chosen, reject, *references = pair
        c, r = (self.log_probs(prompt + answer)[len(prompt) - 1:].sum() for answer in (chosen, reject))
        counts = len(chosen), len(reject)

        def published(log_chosen: float, log_reject: float) -> float:
            return formula(loss, log_chosen, log_reject, *references, *counts, beta, gamma, smoothing)

        step = 1e-5
        at = c.item(), r.item()
        by_chosen = (published(at[0] + step, at[1]) - published(at[0] - step, at[1])) / (2 * step)
        by_reject = (published(at[0], at[1] + step) - published(at[0], at[1] - step)) / (2 * step)
        gradient = (by_chosen - alpha / counts[0]) * self.gradient(c) + by_reject * self.gradient(r)
        return published(*at) - alpha * at[0] / counts[0], gradient

    def text(self, tokens: list[int], trained: list[bool]) -> tuple[float, Tensor, int]:
        """The sum of -log p over a text's tokens that have a loss, its gradient, and how many they are."""
        total = -self.log_probs(tokens)[torch.tensor(trained[1:])].sum()
        return total.item(), self.gradient(total), sum(trained[1:])


class Watched:
    """A run in this process: the pairs or texts of each epoch's micro-batches, and the gradient of each step before clipping."""

    def __init__(self, run: TrainConfig, names: Sequence[str], change: Callable[[type], type] = lambda module: module):
        epochs: list[list[list]] = []
        gradients: list[Tensor] = []
        collate = data.collate

        class Spy(PreferenceModule):
            def on_train_epoch_start(self) -> None:
                epochs.append([])

            def on_before_optimizer_step(self, optimizer) -> None:
                found = dict(self.model.named_parameters())
                gradients.append(torch.cat([(torch.zeros_like(found[name]) if found[name].grad is None else found[name].grad)
                                            .flatten().double() for name in names]))

        def seen(pairs):
            epochs[-1].append(list(pairs))
            return collate(pairs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("src.training.run.PreferenceModule", change(Spy))
            patch.setattr(data, "collate", seen)
            train(run, {})
        self.epochs, self.gradients = epochs, gradients
        accumulate = run.steps.accumulate_grad_batches
        self.steps = [sum(epoch[start:start + accumulate], []) for epoch in epochs for start in range(0, len(epoch), accumulate)]
