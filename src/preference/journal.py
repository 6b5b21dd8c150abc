"""The journal of a long computation: its finished batches, in a file next to its output, so that it can be resumed.

The first line identifies the computation by a digest; each other line holds a batch's number, its results and
their checksum.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from src.checked_json import BadJson, parse_json
from src.errors import NotFinite, UserError
from src.files import append_whole, cut_back, is_open_as, open_alone, remedy
from src.preference.entries import is_log_prob

_HEADER = re.compile(rb'"[0-9a-f]{64}"')
_TORN_HEADER = re.compile(rb'"?[0-9a-f]{0,64}"?')


class Journal:
    """An open journal, made by `open_journal`.

    `done` has the results of the finished batches, by their numbers: [pairs, 2] float64, the log-probabilities of each pair's
    chosen and rejected answer.
    """

    def __init__(self, path: Path, descriptor: int, done: dict[int, np.ndarray]):
        self.path, self.done, self._descriptor = path, done, descriptor

    def append(self, number: int, values: np.ndarray) -> None:
        """Write a batch's results and wait until they are on disk. Raises UserError if that fails."""
        line = json.dumps([number, values.tolist()])
        _append(self.path, self._descriptor, f"{line} {_checksum(line.encode())}")
        self.done[number] = values

    def check(self, sizes: Sequence[int]) -> None:
        """Raise UserError if a finished batch does not have its number of pairs in `sizes`."""
        for number, values in self.done.items():
            if number >= len(sizes) or len(values) != sizes[number]:
                raise UserError(f"{self.path}: is damaged (batch {number} has {len(values)} pairs, unlike in this run); "
                                "remove it to start over")


@contextmanager
def hold_journal(path: Path) -> Iterator[int]:
    """A descriptor of the journal's file, locked against other runs. If the file is empty at the end, it is removed, with the
    folders that were made for it.

    Raises UserError if it can't be written, or another run holds it.
    """
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    while True:
        with open_alone(path, "--output_save") as descriptor:
            # The holder before may have removed the file after it was opened here; a lock on that excludes nobody.
            if not is_open_as(descriptor, path):
                continue
            try:
                yield descriptor
            finally:
                if os.fstat(descriptor).st_size == 0:
                    path.unlink(missing_ok=True)
                    with suppress(OSError):  # a folder that is not empty
                        for made in missing:
                            made.rmdir()
            return


@contextmanager
def open_journal(path: Path, descriptor: int, digest: str) -> Iterator[Journal]:
    """Start the journal, or continue that of an interrupted run; `descriptor` is from `hold_journal`.

    It is removed when the block ends without an error, and also on an error if nothing is finished or the error would recur
    (NotFinite): only work worth keeping stays. A journal of another computation is overwritten if nothing in it is finished.

    Raises:
        UserError: it belongs to another computation, is damaged, or can't be written.
    """
    done: dict[int, np.ndarray] = {}
    with path.open("rb") as file:
        header = file.readline()
        size = len(header) if header.endswith(b"\n") else 0
        if not (_HEADER if size else _TORN_HEADER).fullmatch(header.removesuffix(b"\n")):
            raise UserError(f"{path}: is damaged, or no file of this script's; remove it to start over")
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):  # it was cut short
                break
            batch, values = _read_batch(line[:-1], f"{path}: is damaged (line {number}")
            if batch in done:
                raise UserError(f"{path}: is damaged (a batch is there twice); remove it to start over")
            done[batch], size = values, size + len(line)
    ours = json.dumps(digest).encode() + b"\n"
    if header != ours and done:
        raise UserError(f"{path}: was left by an interrupted run with another model, input or other flags; give the same "
                        "again to continue, or remove it to start over")
    cut_back(descriptor, size if header == ours else 0, path)
    if header != ours:
        _append(path, descriptor, json.dumps(digest))
    journal = Journal(path, descriptor, done)
    try:
        yield journal
    except BaseException as error:
        if not journal.done or isinstance(error, NotFinite):
            path.unlink()
        raise
    path.unlink()


def _read_batch(line: bytes, where: str) -> tuple[int, np.ndarray]:
    line, _, checksum = line.rpartition(b" ")
    if checksum != _checksum(line).encode():
        raise UserError(f"{where} has a wrong checksum); remove it to start over")
    try:
        batch: Any = parse_json(line, [(int, [[float]])])
    except BadJson as error:
        raise UserError(f"{where}: {error}); remove it to start over") from None
    number, values = batch if len(batch) == 2 else (None, None)
    if not (isinstance(number, int) and number >= 0 and isinstance(values, list)):
        raise UserError(f"{where} is not a batch's number and its results); remove it to start over")
    if not all(len(pair) == 2 and all(map(is_log_prob, pair)) for pair in values):
        raise UserError(f"{where} has numbers that can't be log-probabilities of answers); remove it to start over")
    return number, np.array(values, float).reshape(-1, 2)


def _checksum(line: bytes) -> str:
    return f"{zlib.crc32(line):08x}"


def _append(path: Path, descriptor: int, line: str) -> None:
    try:
        append_whole(descriptor, line.encode() + b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was finished is saved: {remedy(error)}, then the "
                        "same command continues from there") from error
