"""Writes pairs as `torch.save` writes a list of tuples, but one after another, so that they need not all be in memory."""

import pickle
import struct
import sys
import zipfile
from array import array
from collections.abc import Iterator
from typing import IO, Any

from src.preference.entries import MORE, Numbered
from src.preference.stored import Pairs
from src.progress import bar_if_long

_AT_ONCE = 1000  # items that the pickle module appends to a list at once


def write_pairs(pairs: Pairs, file: IO[bytes]) -> None:
    """An archive that torch.load reads. The same pairs give the same bytes; a list of tokens that pairs share is in it once.

    Raises OSError if writing fails.
    """
    with zipfile.ZipFile(file, "w") as archive:
        # ZipInfo has a fixed date. The size is known only at the end, and may be over 4 GB.
        with archive.open(zipfile.ZipInfo("archive/data.pkl"), "w", force_zip64=True) as entry, \
                bar_if_long("pairs to the file", len(pairs)) as advance:
            for piece, count in _Pickle(pairs).pieces():
                entry.write(piece)
                advance(count)
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), sys.byteorder)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


class _Pickle:
    """The pickle of a list of pairs, with the instructions that the pickle module takes in protocol 2 (see `pickletools`)."""

    def __init__(self, pairs: Pairs):
        self._pairs = pairs
        # What a pickle refers to again has a number. Tokens and names have theirs here, by the numbers of lists and by name.
        self._count = 0
        self._of_tokens = array("q", [-1]) * len(pairs.lists)
        self._of_names: dict[str, int] = {}

    def pieces(self) -> Iterator[tuple[bytes, int]]:
        """Bytes, with the number of pairs that are in them."""
        pairs = self._pairs
        yield b"\x80\x02]" + self._numbered(), 0
        for first in range(0, len(pairs), _AT_ONCE):
            some = range(first, min(first + _AT_ONCE, len(pairs)))
            entries = b"".join(self._entry(pairs.numbered(at)) for at in some)
            yield entries + b"a" if len(pairs) == 1 else b"(" + entries + b"e", len(some)
        yield b".", 0

    def _entry(self, pair: Numbered) -> bytes:
        parts = [*map(self._tokens, pair[:3]), *map(_plain, pair[3:5])]
        more = [(name, value) for name, value in zip(MORE, pair[5:], strict=True) if value]
        if more:
            begin = b"}" + self._numbered()
            items = [self._name(name) + (self._tokens(pair.kl) if name == "kl" else _plain(value)) for name, value in more]
            parts.append(begin + (items[0] + b"s" if len(items) == 1 else b"(" + b"".join(items) + b"u"))
        return b"(" + b"".join(parts) + b"t" + self._numbered()

    def _tokens(self, number: int) -> bytes:
        if self._of_tokens[number] >= 0:
            return _again(self._of_tokens[number])
        self._of_tokens[number] = self._count
        # A pickle of a list alone begins with the protocol, an empty list and its number, and ends with a stop.
        return b"]" + self._numbered() + pickle.dumps(self._pairs.lists[number], 2)[5:-1]

    def _name(self, name: str) -> bytes:
        if name in self._of_names:
            return _again(self._of_names[name])
        self._of_names[name] = self._count
        return b"X" + struct.pack("<I", len(name)) + name.encode() + self._numbered()

    def _numbered(self) -> bytes:
        """Give the next number to what is before."""
        number, self._count = self._count, self._count + 1
        return struct.pack("<cB", b"q", number) if number < 256 else struct.pack("<cI", b"r", number)


def _again(number: int) -> bytes:
    return struct.pack("<cB", b"h", number) if number < 256 else struct.pack("<cI", b"j", number)


def _plain(value: Any) -> bytes:
    """A number without the protocol before it and the stop after it."""
    return pickle.dumps(value, 2)[2:-1]
