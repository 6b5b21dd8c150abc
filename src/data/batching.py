"""Which pairs form a batch, and in what order. Knows nothing about texts or models."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, count, islice

import numpy as np

from src.data.packing import Sizes, sizes_of

# Pairs that are sorted by length together: enough for batches of similar lengths, few enough that each pass mixes them again.
WINDOW = 512
AT_ONCE = 1 << 16


def batches_by_tokens(pairs: Sequence[tuple] | Sizes, batch_tokens: int, among: Iterable[int] | None = None) -> list[list[int]]:
    """Split the indices of `pairs`, or those `among` them, into groups of at most `batch_tokens` input tokens, longest first.

    Pairs with the same prompt come together, since they share it; otherwise lengths within a group are similar. A pair longer
    than `batch_tokens` is a group of its own. Every index occurs exactly once; the longest come first, so that a batch that
    does not fit in memory fails at the start.

    Args:
        pairs: or texts, or the `sizes_of` them.
    """
    sizes = pairs if isinstance(pairs, Sizes) else sizes_of(pairs)
    indices = np.arange(len(sizes.rest)) if among is None else np.fromiter(among, np.int64)
    alone, shared = sizes.alone[indices], sizes.rest[indices]
    _, first, prompt = np.unique(sizes.same[indices], return_index=True, return_inverse=True)
    longest = np.zeros(len(first), np.int64)
    np.maximum.at(longest, prompt, alone)
    # By the longest pair of the prompt, then the prompt, then the length.
    order = np.lexsort((-alone, first[prompt], -longest[prompt]))
    groups: list[list[int]] = []
    total, before = 0, -1
    for index, of_prompt, length, added in _in_python(np.stack([indices, prompt, alone, shared], axis=1)[order]):
        added = added if of_prompt == before else length
        if not groups or total + added > batch_tokens:
            groups.append([])
            total, added = 0, length
        groups[-1].append(index)
        total, before = total + added, of_prompt
    return groups


def _in_python(rows: np.ndarray) -> Iterator[list[int]]:
    """The rows as lists, of which there are never many at once: a number in a list takes four times its memory."""
    for start in range(0, len(rows), AT_ONCE):
        yield from rows[start:start + AT_ONCE].tolist()


def epoch_order(n_pairs: int, seed: int, start: int, count: int) -> list[int]:
    """Positions start .. start + count - 1 of an endless sequence of pair indices, pass after pass.

    Each pass over the data is a permutation of its own, drawn only from the seed and the pass's number. So each
    pair is seen once a pass, and any part of the sequence can be made without what comes before it: a run that
    resumes at a position continues with exactly the pairs that an uninterrupted run would see.
    """
    order: list[int] = []
    while len(order) < count:
        number, skipped = divmod(start + len(order), n_pairs)
        order += _permutation(n_pairs, seed, number)[skipped:skipped + count - len(order)].tolist()
    return order


def pass_by_tokens(pairs: Sequence[tuple] | Sizes, seed: int, number: int, batch_tokens: int) -> list[list[int]]:
    """Batches of at most `batch_tokens` input tokens that see every pair once; the order depends only on seed and `number`.

    Pass `number` draws a permutation, sorts each window of it by length and cuts it into batches, and shuffles these.
    """
    sizes = pairs if isinstance(pairs, Sizes) else sizes_of(pairs)
    order = _permutation(len(sizes.rest), seed, number)
    windows = (order[start:start + WINDOW].tolist() for start in range(0, len(order), WINDOW))
    batches = [batch for window in windows for batch in batches_by_tokens(sizes, batch_tokens, window)]
    shuffled = np.random.default_rng([seed, number, 1]).permutation(len(batches))
    return [batches[at] for at in shuffled]


def batches_from(pairs: Sequence[tuple] | Sizes, seed: int, batch_tokens: int, start: int) -> Iterator[list[int]]:
    """The endless sequence of all passes' batches, from number `start` on."""
    sizes = pairs if isinstance(pairs, Sizes) else sizes_of(pairs)
    passes = (pass_by_tokens(sizes, seed, number, batch_tokens) for number in count())
    return islice(chain.from_iterable(passes), start, None)


@lru_cache(maxsize=2)  # many short parts of a long pass are read one after another
def _permutation(n_pairs: int, seed: int, number: int) -> np.ndarray:
    order = np.random.default_rng([seed, number]).permutation(n_pairs)
    order.setflags(write=False)
    return order
