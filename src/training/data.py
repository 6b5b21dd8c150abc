"""The training pairs, or texts, as micro-batches that know what they weigh in their optimizer step, in a stateless order: any
epoch can be had without those before it."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.preference.batching import batches_from, epoch_order, pass_by_tokens
from src.preference.packing import PackedBatch, Text, TextBatch, pack_pairs, pack_texts
from src.preference.pairs import Pair


class MicroBatch(NamedTuple):
    """What one process computes at a time."""

    indices: list[int]  # of the pairs, or texts
    # What the loss of each pair (of each token, in texts) weighs: 1 / how many of them the whole optimizer step has, over all its
    # micro-batches and processes. 0 in a batch that only keeps a process busy while the others finish the epoch.
    share: float


class PairBatches:
    """The micro-batches of every epoch, for every process.

    Epochs take up the endless sequence of passes, each of which sees every pair once in a seeded order, where the epoch before
    left off. With several processes, each takes every world_size-th micro-batch.

    Args:
        epoch_steps: micro-batches an epoch, for each process; 0 makes each epoch one pass.
        micro_bsz: pairs in a micro-batch.
        batch_tokens: where not 0, a micro-batch has as many pairs as these input tokens hold, of like lengths, instead.
        accumulate: micro-batches an optimizer step, for each process; the last step of an epoch has those that are left.
        first_epoch: number of epochs done before.
    """

    def __init__(self, pairs: Sequence[Pair | Text], epoch_steps: int, micro_bsz: int, batch_tokens: int, accumulate: int,
                 seed: int, first_epoch: int, world_size: int):
        self.pairs, self.epoch_steps, self.micro_bsz, self.batch_tokens = pairs, epoch_steps, micro_bsz, batch_tokens
        self.accumulate, self.seed, self.first_epoch, self.world_size = accumulate, seed, first_epoch, world_size
        # How many losses a step's mean gets from each: one from a pair, as many as it has trained tokens from a text.
        self.losses = [sum(pair.trained[1:]) if isinstance(pair, Text) else 1 for pair in pairs]

    def epoch(self, number: int, rank: int) -> list[MicroBatch]:
        """The micro-batches of process `rank` in the run's epoch `number`, 0 being its first. All processes have as many."""
        batches = self._batches(number)
        micro_batches = []
        for step in _cut(batches, self.accumulate * self.world_size):
            losses = sum(self.losses[index] for batch in step for index in batch)
            # Texts of a single token have none.
            micro_batches += [MicroBatch(batch, 1 / max(losses, 1)) for batch in step]
        # One pair is enough to take part in the exchange of gradients.
        micro_batches += [MicroBatch(batches[0][:1], 0.0)] * (-len(batches) % self.world_size)
        return micro_batches[rank::self.world_size]

    def total_steps(self, epochs: int) -> int:
        """Optimizer steps of so many epochs."""
        together = self.accumulate * self.world_size
        lengths = (self.epoch_steps * self.world_size or len(self._batches(number)) for number in range(epochs))
        return sum(-(-length // together) for length in lengths)

    def _batches(self, number: int) -> list[list[int]]:
        """Those of all processes, in turn."""
        number, count = self.first_epoch + number, self.epoch_steps * self.world_size
        if self.batch_tokens:
            if not count:
                return pass_by_tokens(self.pairs, self.seed, number, self.batch_tokens)
            return list(islice(batches_from(self.pairs, self.seed, self.batch_tokens, number * count), count))
        n_pairs = count * self.micro_bsz or len(self.pairs)
        return _cut(epoch_order(len(self.pairs), self.seed, number * n_pairs, n_pairs), self.micro_bsz)


class TrainingData(pl.LightningDataModule):
    """The loader of each epoch, for a trainer that reloads it every epoch.

    Lightning asks a loader for its length before it announces the epoch, and passes by tokens differ in length; so each epoch
    has a loader of its own.
    """

    def __init__(self, batches: PairBatches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this process: what `collate` makes of each one's pairs or texts, and their share."""
        micro_batches = self.batches.epoch(self.trainer.current_epoch, self.trainer.global_rank)
        # A generator of its own, since a loader draws a seed at each epoch's start, which must not shift dropout's numbers.
        return DataLoader(micro_batches, batch_size=None, collate_fn=self._packed, generator=torch.Generator(),
                          pin_memory=self.trainer.strategy.root_device.type == "cuda")

    def _packed(self, micro_batch: MicroBatch) -> tuple[PackedBatch | TextBatch, Tensor | None, float]:
        return *collate([self.batches.pairs[index] for index in micro_batch.indices]), micro_batch.share


def collate(pairs: Sequence[Pair | Text]) -> tuple[PackedBatch | TextBatch, Tensor | None]:
    """A PackedBatch and each pair's cached references (chosen, reject) in nats, float64 [B, 2]; or a TextBatch and nothing."""
    if isinstance(pairs[0], Text):
        return pack_texts(pairs), None
    return pack_pairs(pairs), torch.tensor([pair[3:] for pair in pairs], dtype=torch.float64)


def _cut(items: list, size: int) -> list[list]:
    return [items[start:start + size] for start in range(0, len(items), size)]
