"""What the output is made of: the input's rows in order, each once with the reject that it has, or once for each to be drawn."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from src.data.faults import Reading
from src.data.rows import Row
from src.data.spill import Stored
from src.generation.requests import Request
from src.progress import counting


class Plan:
    """The output's rows by their numbers, from 0, in some 20 bytes for each row of the input.

    Args:
        count: rejects to draw for a row.
        overwrite: draw them for rows that have a reject too.
    """

    def __init__(self, reading: Reading, count: int, overwrite: bool):
        self.rows: Sequence[Row] = reading.rows
        self._numbers, self._count = reading.numbers, count
        self.kept = np.zeros(len(self.rows), bool)
        if not overwrite:
            for at, row in enumerate(counting(f"{reading.path}: rejects looked at", self.rows)):
                self.kept[at] = bool(row.reject.strip())
        self._starts = np.concatenate([[0], np.cumsum(np.where(self.kept, 1, count))])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, at: int) -> tuple[int, int]:
        """Of the output's row `at`: the index of the input's row, and the number among that row's rejects."""
        row = bisect_right(self._starts.data, at) - 1
        return row, at - int(self._starts[row])

    def known(self) -> Iterator[tuple[int, Row]]:
        """For each row of the output, the number in the input's file, and what is known of it: a reject to draw is ""."""
        for row, number, keep in zip(self.rows, self._numbers, self.kept, strict=True):
            for _ in range(1 if keep else self._count):
                yield number, row if keep else row._replace(reject="")

    def to_answer(self, done: int) -> np.ndarray:
        """[n] int64, the indices of rows that rejects are to be drawn for, if the output has its first `done` rows."""
        return np.flatnonzero(~self.kept & (self._starts[1:] > done))

    def requests(self, done: int, prompts: Sequence[list[int]]) -> "Requests":
        """All rejects to draw, in order; `prompts` are those of the rows `to_answer`."""
        rows = self.to_answer(done)
        return Requests(rows, prompts, self._count, max(0, done - int(self._starts[rows[0]])) if len(rows) else 0)


class Requests(Stored[Request]):
    """`count` answers to each of some rows, but without the first `done`."""

    def __init__(self, rows: np.ndarray, prompts: Sequence[list[int]], count: int, done: int):
        self._rows, self._prompts, self._count, self._done = rows, prompts, count, done

    def __len__(self) -> int:
        return len(self._rows) * self._count - self._done

    def _item(self, at: int) -> Request:
        index, sample = divmod(self._done + at, self._count)
        return Request(int(self._rows[index]), tuple(self._prompts[index]), sample)

    def __iter__(self) -> Iterator[Request]:
        start = self._done
        for row, tokens in zip(self._rows.tolist(), self._prompts, strict=True):
            prompt = tuple(tokens)
            for sample in range(start, self._count):
                yield Request(row, prompt, sample)
            start = 0
