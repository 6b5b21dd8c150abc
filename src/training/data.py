"""The training pairs as a data loader: a stateless order, so that any epoch can be had without those before it."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler

from src.preference.batching import epoch_order
from src.preference.packing import PackedBatch, pack_pairs
from src.preference.pairs import Pair


class PairSampler(Sampler[int]):
    """Pair indices of one epoch; Lightning calls `set_epoch` before each.

    Epochs take up the endless sequence of seeded permutations (`epoch_order`) where the one before left off, so every
    pair is seen once a pass however epochs cut it. With several devices, each takes every world_size-th pair.
    """

    def __init__(self, n_pairs: int, count: int, seed: int, first_epoch: int, rank: int, world_size: int):
        self.n_pairs, self.count, self.seed = n_pairs, count, seed
        self.first_epoch, self.epoch, self.rank, self.world_size = first_epoch, 0, rank, world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        together = self.count * self.world_size
        start = (self.first_epoch + self.epoch) * together
        return iter(epoch_order(self.n_pairs, self.seed, start, together)[self.rank::self.world_size])


def train_loader(pairs: Sequence[Pair], sampler: PairSampler, micro_bsz: int) -> DataLoader:
    """Batches of `micro_bsz` pairs: the PackedBatch, and each pair's cached references (chosen, reject) in nats."""
    # A generator of its own, since a loader draws a seed at each epoch's start, which must not shift dropout's numbers.
    return DataLoader(pairs, batch_size=micro_bsz, sampler=sampler, collate_fn=collate, generator=torch.Generator())


def collate(pairs: Sequence[Pair]) -> tuple[PackedBatch, list[tuple[float, float]]]:
    return pack_pairs(pairs), [(chosen, reject) for _, _, _, chosen, reject in pairs]
