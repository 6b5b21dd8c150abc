"""The training pairs, or texts, as a data loader: a stateless order, so that any epoch can be had without those before it."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch.utils.data import DataLoader, Sampler

from src.preference.batching import batches_from, epoch_order, pass_by_tokens
from src.preference.packing import PackedBatch, Text, TextBatch, pack_pairs, pack_texts
from src.preference.pairs import Pair


class PairBatches(Sampler[list[int]]):
    """The micro-batches of one epoch, as pair indices; Lightning calls `set_epoch` before each.

    Epochs take up the endless sequence of passes, each of which sees every pair once in a seeded order, where the epoch before
    left off. With several devices, each takes every world_size-th pair or batch.

    Args:
        epoch_steps: micro-batches an epoch; 0 makes each epoch one pass.
        micro_bsz: pairs in a micro-batch.
        batch_tokens: where not 0, a micro-batch has as many pairs as these input tokens hold, of like lengths, instead.
    """

    def __init__(self, pairs: Sequence[Pair], epoch_steps: int, micro_bsz: int, batch_tokens: int, seed: int, first_epoch: int,
                 rank: int, world_size: int):
        self.pairs, self.seed = pairs, seed
        self.epoch_steps, self.micro_bsz, self.batch_tokens = epoch_steps, micro_bsz, batch_tokens
        self.first_epoch, self.epoch, self.rank, self.world_size = first_epoch, 0, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch_steps or len(self._pass(self.first_epoch + self.epoch))

    def __iter__(self) -> Iterator[list[int]]:
        number = self.first_epoch + self.epoch
        return iter(self._steps(number) if self.epoch_steps else self._pass(number))

    def total_steps(self, epochs: int, accumulate: int) -> int:
        """Optimizer steps of so many epochs; the last of an epoch takes what micro-batches are left."""
        lengths = (self.epoch_steps or len(self._pass(self.first_epoch + epoch)) for epoch in range(epochs))
        return sum(-(-length // accumulate) for length in lengths)

    def _steps(self, number: int) -> Iterator[list[int]]:
        together = self.epoch_steps * self.world_size
        if self.batch_tokens:
            stream = batches_from(self.pairs, self.seed, self.batch_tokens, number * together)
            return islice(stream, self.rank, together, self.world_size)
        together *= self.micro_bsz
        order = epoch_order(len(self.pairs), self.seed, number * together, together)[self.rank::self.world_size]
        return iter(_cut(order, self.micro_bsz))

    def _pass(self, number: int) -> list[list[int]]:
        if self.batch_tokens:
            batches = pass_by_tokens(self.pairs, self.seed, number, self.batch_tokens)
        else:
            n_pairs = len(self.pairs)
            batches = _cut(epoch_order(n_pairs, self.seed, number * n_pairs, n_pairs), self.micro_bsz)
        # Devices that have no batch left take the first ones again, since all must make as many steps.
        batches += (batches * self.world_size)[:-len(batches) % self.world_size]
        return batches[self.rank::self.world_size]


def train_loader(pairs: Sequence[Pair | Text], batches: PairBatches) -> DataLoader:
    """Micro-batches: the PackedBatch and each pair's cached references (chosen, reject) in nats, or a TextBatch and nothing."""
    # A generator of its own, since a loader draws a seed at each epoch's start, which must not shift dropout's numbers.
    return DataLoader(pairs, batch_sampler=batches, collate_fn=collate, generator=torch.Generator())


def collate(pairs: Sequence[Pair | Text]) -> tuple[PackedBatch | TextBatch, list[tuple[float, float]]]:
    if isinstance(pairs[0], Text):
        return pack_texts(pairs), []
    return pack_pairs(pairs), [(chosen, reject) for _, _, _, chosen, reject in pairs]


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start:start + size] for start in range(0, len(order), size)]
