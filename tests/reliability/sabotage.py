"""Faults that are put into a forked process, to show that the harness finds them."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def _replace(name: str, fault: Any) -> None:
    """In every module of the project that has it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("src.") and hasattr(module, name):
            setattr(module, name, fault)


def _write_in_place() -> None:
    @contextmanager
    def in_place(path: str | Path, mode: str = "wb", **arguments: Any) -> Iterator[IO]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, mode, **arguments) as file:
            yield file

    _replace("atomic_write", in_place)


def _torn_rows_count() -> None:
    """What an interrupted write left is taken for finished."""
    from src.generation import output

    kept = output.read_progress

    def read_progress(file: IO[bytes], *others: Any) -> tuple[int, int]:
        return kept(file, *others)[0], file.seek(0, os.SEEK_END)

    output.read_progress = read_progress


def _refused_writes_pass() -> None:
    from src.generation.output import Output

    kept = Output.write

    def write(output: Output, text: str) -> None:
        try:
            kept(output, text)
        except Exception:
            return

    Output.write = write


def _no_check_of_seeds() -> None:
    from src import values

    object.__setattr__(values.seed, "read", int)  # the settings hold this very reader


def _deaf() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGHUP, lambda *_: None)


FAULTS: dict[str, Callable[[], None]] = {
    "in place": _write_in_place, "torn rows": _torn_rows_count, "refused writes": _refused_writes_pass,
    "seeds": _no_check_of_seeds, "deaf": _deaf,
}
