"""Answers that are still to be written: a request is made when its turn comes, so that millions of them need little memory."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from src.progress import counting


class Request(NamedTuple):
    """One answer to write: the row's number, its prompt's tokens (at least one), and its number among the row's answers."""

    row: int
    prompt: tuple[int, ...]
    sample: int = 0
    attempt: int = 0


class Waiting:
    """The requests that no row of the batch has, in their order, those that were given back first; and how many have a prompt.

    Prompts are counted by their hashes, in 16 bytes each. Two with one hash are counted as one, so that a state may be kept for
    longer than it is needed, or read again: answers do not depend on it.
    """

    def __init__(self, requests: Sequence[Request]):
        self._requests, self._taken = requests, 0
        self._given_back: deque[Request] = deque()
        self._hashes = self._counts = np.empty(0, np.int64).data

    def __len__(self) -> int:
        return len(self._given_back) + len(self._requests) - self._taken

    def __iter__(self) -> Iterator[Request]:
        yield from self._given_back
        yield from islice(self._requests, self._taken, None)

    def survey(self) -> tuple[int, ...]:
        """Count the prompts, which the other methods need; at least one request must wait.

        Returns:
            the common beginning of all prompts, shorter than each of them; () if all are equal.
        """
        hashes = np.empty(len(self), np.int64)
        first = last = next(iter(self)).prompt
        for at, request in enumerate(counting("prompts compared", self)):
            hashes[at] = hash(request.prompt)
            first, last = min(first, request.prompt), max(last, request.prompt)
        distinct, counts = np.unique(hashes, return_counts=True)
        # As views, since numpy takes longer to read one number.
        self._hashes, self._counts = distinct.data, counts.data
        # A beginning that the first and the last in order share is shared by all.
        differing = (at for at, (x, y) in enumerate(zip(first[:-1], last[:-1], strict=False)) if x != y)
        return first[:next(differing, min(len(first), len(last)) - 1)] if first != last else ()

    def take(self, most: int) -> list[Request]:
        """The first requests, at most so many; if that runs out of memory, they wait as before."""
        back = list(islice(self._given_back, most))
        new = self._requests[self._taken:self._taken + most - len(back)]
        self._count(taken := [*back, *new], -1)
        self._taken += len(new)
        for _ in back:
            self._given_back.popleft()
        return taken

    def give_back(self, requests: Sequence[Request]) -> None:
        """Put requests before all others, in this order."""
        self._given_back.extendleft(reversed(requests))
        self._count(requests, 1)

    def need(self, prompt: tuple[int, ...]) -> bool:
        """Whether a waiting request has this prompt."""
        return bool(self._counts[bisect_left(self._hashes, hash(prompt))])

    def _count(self, requests: Sequence[Request], change: int) -> None:
        for request in requests:
            self._counts[bisect_left(self._hashes, hash(request.prompt))] += change
