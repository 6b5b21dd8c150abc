"""Rows that may be too many for memory: a list if they are few, else a file without a name, from which each is read when used.

The file is in the folder for temporary files (the environment's TMPDIR), and has no name from its beginning on: nothing of it is
left, however the process ends. It is read with `pread`, not mapped, since mapped pages would count as the process's memory.
"""

import os
import pickle
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from src.errors import UserError
from src.files import remedy, write_all

Item = TypeVar("Item")
IN_MEMORY = 1 << 23  # bytes; more go to a file
BLOCK = 1 << 20  # bytes written, and read ahead, at a time


class Storage:
    """Bytes that are appended, and read from any place: in memory up to IN_MEMORY, then in a file without a name.

    Of several that are shares of one table, each has that part of IN_MEMORY.

    Raises UserError if that file can't be made or written.
    """

    def __init__(self, share: int = 1) -> None:
        self._share = share
        self._file: Any = None
        self._held = bytearray()  # what is not in the file
        self._written = 0

    @property
    def size(self) -> int:
        return self._written + len(self._held)

    @property
    def is_in_memory(self) -> bool:
        return self._file is None

    def append(self, data: bytes) -> None:
        self._held += data
        if len(self._held) > (IN_MEMORY // self._share if self._file is None else BLOCK):
            self._write()

    def read(self, start: int, end: int) -> bytes:
        """Bytes number `start` .. `end` - 1, all of which there must be."""
        if start >= self._written:
            return bytes(self._held[start - self._written:end - self._written])
        data = os.pread(self._file.fileno(), min(end, self._written) - start, start)
        return data + self._held[:end - self._written] if end > self._written else data

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed when nothing uses it any more
            write_all(self._file.fileno(), bytes(self._held))
        except OSError as error:
            raise UserError(f"{_folder()}: cannot be written ({error.strerror or error}), where rows that are too many for "
                            f"memory are kept; {remedy(error)}, or set TMPDIR to a folder with room for twice the data") from None
        self._written += len(self._held)
        self._held.clear()


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR", "/tmp")


class Stored(Sequence[Item], Generic[Item]):
    """A sequence whose items are read when they are asked for, each as a new object; it equals any sequence of equal items."""

    def _item(self, at: int) -> Item:
        raise NotImplementedError

    @overload
    def __getitem__(self, at: int) -> Item: ...

    @overload
    def __getitem__(self, at: slice) -> list[Item]: ...

    def __getitem__(self, at: int | slice) -> Item | list[Item]:
        if isinstance(at, slice):
            return [self._item(place) for place in range(*at.indices(len(self)))]
        place = at + len(self) if at < 0 else at
        if not 0 <= place < len(self):
            raise IndexError(at)
        return self._item(place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Spill(Stored[Item]):
    """Items of any kinds, to be appended and then read; `finished` is what to hand on."""

    def __init__(self, items: Iterable[Item] = (), share: int = 1) -> None:
        self._few: list[Item] | None = []  # as long as all are in memory
        self._storage = Storage(share)
        self._ends = array("q", [0])
        self._aside: dict[int, Item] = {}
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, item: Item) -> None:
        try:
            # Only this process reads it back. Other formats know fewer of the types that Arrow's values have.
            self._storage.append(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
        except (RecursionError, TypeError, AttributeError, pickle.PicklingError):  # deeply nested lists
            self._aside[len(self)] = item
        self._ends.append(self._storage.size)
        if self._few is not None:
            self._few.append(item)
            if not self._storage.is_in_memory:
                self._few = None

    def finished(self) -> Sequence[Item]:
        """The items: a list if they are few, else this."""
        return self if self._few is None else self._few

    def _item(self, at: int) -> Item:
        if self._few is not None:
            return self._few[at]
        if at in self._aside:
            return self._aside[at]
        return pickle.loads(self._storage.read(self._ends[at], self._ends[at + 1]))

    def __iter__(self) -> Iterator[Item]:
        at = 0
        while at < len(self):
            start, first = self._ends[at], at
            while at < len(self) and (at == first or self._ends[at + 1] - start <= BLOCK):
                at += 1
            block = memoryview(self._storage.read(start, self._ends[at]))
            for place in range(first, at):
                yield self._aside[place] if place in self._aside else \
                    pickle.loads(block[self._ends[place] - start:self._ends[place + 1] - start])


class Numbers(Stored[int]):
    """Whole numbers in 8 bytes each, a fifth of what a list of them takes."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def append(self, number: int) -> None:
        self._numbers.append(number)

    def _item(self, at: int) -> int:
        return self._numbers[at]

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)
