"""The training pairs, or texts, as micro-batches that know their weight in their optimizer step. The order is stateless: any
epoch can be made without those before it."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple, cast, overload

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.data.batching import batches_from, epoch_order, pass_by_tokens
from src.data.binidx import Pieces
from src.data.packing import PackedBatch, Text, TextBatch, pack_pairs, pack_texts, sizes_of
from src.data.token_lists import Texts
from src.errors import UserError
from src.preference.entries import Pair
from src.preference.kto import pack_mismatched
from src.progress import progress_bar

# With KTO, of each of a step's micro-batches: its mismatched answers, packed, their references, and its share.
Ahead = list[tuple[PackedBatch, Tensor, float]]
# Most micro-batches to make to find where an epoch begins: some minutes.
MOST_BEFORE = 10**7


class MicroBatch(NamedTuple):
    """What one process computes at a time."""

    indices: list[int]  # of the pairs, or texts
    # Weight of each pair's loss (each token's, in texts): 1 / how many of them the whole optimizer step has, over all its
    # micro-batches and processes. 0 in a batch that only keeps a process busy while the others finish the epoch.
    share: float
    # With KTO, in the first of an optimizer step: all of the process's micro-batches in it, whose KL is needed before.
    ahead: tuple["MicroBatch", ...] = ()


class PairBatches:
    """The micro-batches of every epoch, for every process.

    A pass sees every pair once, in a seeded order. Each epoch continues the endless sequence of passes where the epoch before
    left off. With several processes, each takes every world_size-th micro-batch.

    Args:
        epoch_steps: micro-batches an epoch, for each process; 0 makes each epoch one pass.
        micro_bsz: pairs in a micro-batch.
        batch_tokens: if not 0, a micro-batch instead has as many pairs, of similar length, as fit in so many input tokens.
        accumulate: micro-batches an optimizer step, for each process; the last step of an epoch has those that are left.
        first_epoch: number of epochs done before.
        with_kl: give the first micro-batch of each optimizer step all of the step's, for KTO.
    """

    def __init__(self, pairs: Sequence[Pair | Text], epoch_steps: int, micro_bsz: int, batch_tokens: int, accumulate: int,
                 seed: int, first_epoch: int, world_size: int, with_kl: bool = False):
        self.pairs, self.epoch_steps, self.world_size = pairs, epoch_steps, world_size
        self.accumulate, self.with_kl = accumulate, with_kl
        self.together = accumulate * world_size  # micro-batches of an optimizer step
        self.draw = _ByTokens(pairs, epoch_steps * world_size, batch_tokens, seed, first_epoch) if batch_tokens else \
            _ByNumber(pairs, epoch_steps * world_size, micro_bsz, seed, first_epoch)

    def epoch(self, number: int, rank: int) -> "Epoch":
        """The micro-batches of process `rank` in the run's epoch `number`, from 0. All processes have the same number."""
        return Epoch(self, number, rank)

    def total_steps(self, epochs: int) -> int:
        """Optimizer steps of so many epochs."""
        if isinstance(self.draw, _ByNumber) or self.epoch_steps:
            return epochs * -(-self.draw.length(0) // self.together)
        with _bar_if_long("counting the steps of epochs", epochs, epochs * len(self.pairs)) as advance:
            steps = 0
            for number in range(epochs):
                steps += -(-self.draw.length(number) // self.together)
                advance(1)
        return steps

    def smallest_step(self, most: int = 1000) -> int:
        """Fewest losses of an optimizer step, of the first `most` of the first epoch and its last one."""
        length = self.draw.length(0)
        starts = {*range(0, length, self.together)[:most], (length - 1) // self.together * self.together}
        return min(self.draw.losses(0, start, min(start + self.together, length)) for start in sorted(starts))


class Epoch(Sequence[MicroBatch]):
    """One process's micro-batches in one epoch. There may be very many, so each is made on access, fastest in order."""

    def __init__(self, batches: PairBatches, number: int, rank: int):
        self._batches, self._number, self._rank = batches, number, rank
        self._all = batches.draw.length(number)  # of all processes
        self._step, self._share = -1, 0.0

    def __len__(self) -> int:
        return -(-self._all // self._batches.world_size)

    @overload
    def __getitem__(self, at: int) -> MicroBatch: ...

    @overload
    def __getitem__(self, at: slice) -> list[MicroBatch]: ...

    def __getitem__(self, at: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(at, slice):
            return [self._batch(place) for place in range(*at.indices(len(self)))]
        return self._batch(at)

    def _batch(self, at: int) -> MicroBatch:
        if not 0 <= at < len(self):
            raise IndexError(at)
        accumulate = self._batches.accumulate
        if not self._batches.with_kl or at % accumulate:
            return self._plain(at)
        ahead = tuple(map(self._plain, range(at, min(at + accumulate, len(self)))))
        return ahead[0]._replace(ahead=ahead)

    def _plain(self, at: int) -> MicroBatch:
        place, draw, together = at * self._batches.world_size + self._rank, self._batches.draw, self._batches.together
        step = place // together
        if place >= self._all:
            # One pair is enough to take part in the exchange of gradients.
            return MicroBatch(draw.batch(self._number, step * together)[:1], 0.0)
        if step != self._step:
            first, end = step * together, min((step + 1) * together, self._all)
            # Texts of a single token have no loss.
            self._step, self._share = step, 1 / max(draw.losses(self._number, first, end), 1)
        return MicroBatch(draw.batch(self._number, place), self._share)


class _Losses:
    """How many losses each contributes to a step's mean: a pair one, a text one for each trained token."""

    def __init__(self, pairs: Sequence[Pair | Text]):
        if isinstance(pairs, Pieces | Texts):
            self._of = pairs.losses()
        elif pairs and isinstance(pairs[0], Text):
            self._of = np.array([sum(text.trained[1:]) for text in cast(Sequence[Text], pairs)])
        else:
            self._of = np.ones(len(pairs), np.int64)
        self.of_all = int(self._of.sum())

    def of(self, indices: list[int]) -> int:
        return int(self._of[indices].sum())


class _ByNumber:
    """Batches of equally many pairs, except the last of an epoch. `count` batches make an epoch; 0: one pass."""

    def __init__(self, pairs: Sequence[Pair | Text], count: int, size: int, seed: int, first_epoch: int):
        self._pairs, self._size, self._seed, self._first_epoch = len(pairs), size, seed, first_epoch
        self._in_epoch, self._losses = count * size or len(pairs), _Losses(pairs)

    def length(self, _: int) -> int:
        return -(-self._in_epoch // self._size)

    def batch(self, epoch: int, at: int) -> list[int]:
        start = at * self._size
        return epoch_order(self._pairs, self._seed, self._start(epoch) + start, min(self._size, self._in_epoch - start))

    def losses(self, epoch: int, first: int, end: int) -> int:
        """Of batches first .. end - 1. Whole passes count as known; only the partial pass at each end is summed."""
        start, count = self._start(epoch) + first * self._size, min(end * self._size, self._in_epoch) - first * self._size
        before = min(-start % self._pairs, count)
        passes, after = divmod(count - before, self._pairs)
        parts = ((start, before), (start + count - after, after))
        return passes * self._losses.of_all + sum(self._losses.of(epoch_order(self._pairs, self._seed, *part)) for part in parts)

    def _start(self, epoch: int) -> int:
        return (self._first_epoch + epoch) * self._in_epoch


class _ByTokens:
    """Batches of as many pairs as `batch_tokens` hold. `count` batches make an epoch; 0: one pass."""

    def __init__(self, pairs: Sequence[Pair | Text], count: int, batch_tokens: int, seed: int, first_epoch: int):
        if first_epoch * count > MOST_BEFORE:
            raise UserError(f"--epoch_begin {first_epoch}: with --batch_tokens all {first_epoch * count:,} micro-batches before "
                            f"it would have to be made, more than {MOST_BEFORE:,}; lower it or --epoch_steps")
        self._sizes, self._count, self._batch_tokens, self._seed = sizes_of(pairs), count, batch_tokens, seed
        self._first_epoch, self._losses = first_epoch, _Losses(pairs)
        self._pass: tuple[int, list[list[int]]] = (-1, [])  # the last one used, with its number
        self._endless, self._next = batches_from(self._sizes, seed, batch_tokens, 0), 0
        self._held: tuple[int, list[list[int]]] = (0, [])  # batches of the endless sequence, with their start

    def length(self, epoch: int) -> int:
        return self._count or len(self._whole_pass(epoch))

    def batch(self, epoch: int, at: int) -> list[int]:
        return self._part(epoch, at, at + 1)[0]

    def losses(self, epoch: int, first: int, end: int) -> int:
        return sum(map(self._losses.of, self._part(epoch, first, end)))

    def _part(self, epoch: int, first: int, end: int) -> list[list[int]]:
        if not self._count:
            return self._whole_pass(epoch)[first:end]
        begin = (self._first_epoch + epoch) * self._count
        first, end = begin + first, begin + end
        start, held = self._held
        if not start <= first <= end <= start + len(held):
            self._held = (start, held) = first, self._take(first, end - first)
        return held[first - start:end - start]

    def _whole_pass(self, epoch: int) -> list[list[int]]:
        number = self._first_epoch + epoch
        if self._pass[0] != number:
            self._pass = number, pass_by_tokens(self._sizes, self._seed, number, self._batch_tokens)
        return self._pass[1]

    def _take(self, start: int, count: int) -> list[list[int]]:
        """A part of the endless sequence. All batches before it have to be made, since passes differ in length."""
        if start < self._next:
            self._endless, self._next = batches_from(self._sizes, self._seed, self._batch_tokens, 0), 0
        with _bar_if_long("finding where the epoch begins, batch", start - self._next, start - self._next) as advance:
            while self._next < start:
                step = min(1000, start - self._next)
                deque(islice(self._endless, step), maxlen=0)
                self._next += step
                advance(step)
        self._next += count
        return list(islice(self._endless, count))


def _bar_if_long(what: str, total: int, work: int) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar for work of more than a few seconds."""
    return progress_bar(what, total) if work > 10**5 else nullcontext(lambda count: None)


class TrainingData(pl.LightningDataModule):
    """The loader of each epoch, for a trainer that reloads it every epoch.

    Lightning reads a loader's length before it announces the epoch, and passes by tokens differ in length; so each epoch has a
    loader of its own.
    """

    def __init__(self, batches: PairBatches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this process: each one's pairs or texts, collated, their share, and what of the step comes before."""
        assert self.trainer is not None  # the trainer calls this
        micro_batches = cast(Dataset[MicroBatch], self.batches.epoch(self.trainer.current_epoch, self.trainer.global_rank))
        # A generator of its own: a loader draws a seed at each epoch's start, which must not shift dropout's numbers.
        return DataLoader(micro_batches, batch_size=None, collate_fn=self._packed, generator=torch.Generator(),
                          pin_memory=self.trainer.strategy.root_device.type == "cuda")

    def _packed(self, micro_batch: Any) -> tuple[PackedBatch | TextBatch, Tensor | None, float, Ahead]:
        pairs = self.batches.pairs
        ahead = [(*pack_mismatched([cast(Pair, pairs[index]) for index in one.indices]), one.share) for one in micro_batch.ahead]
        return *collate([pairs[index] for index in micro_batch.indices]), micro_batch.share, ahead


def collate(items: Sequence[Pair | Text]) -> tuple[PackedBatch | TextBatch, Tensor | None]:
    """A PackedBatch and each pair's cached references (chosen, reject) in nats, float64 [B, 2]; or a TextBatch and None."""
    texts = [item for item in items if isinstance(item, Text)]
    if texts:
        return pack_texts(texts), None
    pairs = [item for item in items if not isinstance(item, Text)]
    references = [(pair.chosen_base_prob, pair.reject_base_prob) for pair in pairs]
    return pack_pairs(pairs), torch.tensor(references, dtype=torch.float64)
