"""Losses and their gradients in float64, one answer or text at a time, from the formulas; and what a real run did instead."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import src.training.batches as micro_batches
from src.preference.pairs import load_pairs
from src.training.config import TrainConfig
from src.training.module import PreferenceModule
from src.training.run import train
from tests.training.plain_steps import pair_numbers, text_numbers

ALPHA, BETA = 0.3, 0.2


def save_pairs(source: Path, path: Path, count: int = 5) -> Path:
    """Pairs of unequal lengths, with references some nats off, so that each pair has a margin and a gradient of its own."""
    pairs = load_pairs(source, 256, 512)[0][:count]
    torch.save([(*pair[:3], pair[3] - 3.0 + 4 * number, pair[4] + number) for number, pair in enumerate(pairs)], path)
    return path


class Exact:
    """A checkpoint in float64; gradients are those of the blocks' parameters, as one vector."""

    def __init__(self, checkpoint: Path):
        self.weights = {name: tensor.double() for name, tensor in torch.load(checkpoint, weights_only=True).items()}
        self.parameters = {name: weight.requires_grad_() for name, weight in self.weights.items() if name.startswith("blocks.")}

    def gradient(self, value: Tensor) -> Tensor:
        found = torch.autograd.grad(value, list(self.parameters.values()), materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    def pair(self, pair: tuple) -> tuple[float, Tensor]:
        """DPO's loss of one pair with its share of SFT, and its gradient."""
        loss = pair_numbers(self.weights, pair[:5], {"dpo_beta": BETA, "dpo_alpha": ALPHA})["loss"]
        return loss.item(), self.gradient(loss)

    def text(self, tokens: list[int], trained: list[bool]) -> tuple[float, Tensor, int]:
        """The sum of -log p over a text's tokens that have a loss, its gradient, and how many they are."""
        numbers = text_numbers(self.weights, (tokens, trained), {})
        return numbers["loss"].item(), self.gradient(numbers["loss"]), numbers["count"].item()


class Watched:
    """A run in this process: the pairs or texts of each epoch's micro-batches, and the gradient of each step before clipping."""

    def __init__(self, run: TrainConfig, names: Sequence[str]):
        epochs: list[list[list]] = []
        gradients: list[Tensor] = []
        collate = micro_batches.collate

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
            patch.setattr("src.training.run.PreferenceModule", Spy)
            patch.setattr(micro_batches, "collate", seen)
            train(run, {})
        self.epochs, self.gradients = epochs, gradients
        accumulate = run.steps.accumulate_grad_batches
        self.steps = [sum(epoch[start:start + accumulate], []) for epoch in epochs for start in range(0, len(epoch), accumulate)]
