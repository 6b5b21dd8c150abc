"""What a long computation has finished, line by line beside its output, so that an interrupted one goes on.

The first line tells by a digest which computation it is; each other one holds a batch's number and its results.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from src.errors import UserError
from src.files import open_alone

# Results of a batch: of each pair, the log-probabilities of its chosen and its rejected answer.
Values = list[list[float]]


class Journal:
    """An open journal; `done` has the results of the batches that are finished. Made by `open_journal`."""

    def __init__(self, path: Path, descriptor: int, done: dict[int, Values]):
        self.path, self.done, self._descriptor = path, done, descriptor

    def append(self, number: int, values: Values) -> None:
        """Write a batch's results and wait until they are on disk. Raises UserError where the disk refuses."""
        _append(self.path, self._descriptor, json.dumps([number, values]))
        self.done[number] = values


@contextmanager
def open_journal(path: Path, digest: str) -> Iterator[Journal]:
    """Begin the journal, or go on with the one that a broken-off run left; it is removed when the block ends without an error.

    Raises:
        UserError: it belongs to another computation, is damaged, can't be written, or another run is writing it.
    """
    with open_alone(path, "--output_save") as descriptor:
        data = path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]  # a last line without its end was torn off
        if whole != data:
            os.ftruncate(descriptor, len(whole))
        try:
            first, *others = map(json.loads, whole.splitlines() or [json.dumps(digest)])
            done = {number: values for number, values in others}
        except (ValueError, TypeError):
            raise UserError(f"{path}: is damaged; remove it to begin again") from None
        if first != digest:
            raise UserError(f"{path}: was left by an interrupted run with another model, input or other flags; give the same "
                            "again to go on, or remove it to begin anew")
        if not whole:
            _append(path, descriptor, json.dumps(digest))
        yield Journal(path, descriptor, done)
        path.unlink()


def _append(path: Path, descriptor: int, line: str) -> None:
    rest = line.encode() + b"\n"
    try:
        while rest:
            rest = rest[os.write(descriptor, rest):]
        os.fsync(descriptor)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was finished before is saved, and the same command "
                        "goes on from there once the disk has room") from error
