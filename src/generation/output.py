"""The growing output CSV: complete records only, in the input's order, each on disk before the next begins.

A record is compared byte for byte with what this module would write for the input's row. That shows where a
write was cut short, and whether the file belongs to another input. `OUTPUT.csv.json` keeps the settings, so that
one file never mixes answers of two models or two ways of sampling, and, once the file is complete, the summary
of the run that finished it.
"""

import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from src.checked_json import BadJson, parse_json
from src.data.csv import HEADER, Row, format_row
from src.data.load_template import REJECTS, difference, recorded_in
from src.errors import UserError
from src.files import append_whole, atomic_write, cut_back, json_text, open_alone, regular_file, remedy
from src.progress import counting

_ANOTHER = "choose another --output_csv, or remove this one"
# From where a reject begins: the field with the line's end, and the part of it that is left when a write is cut short.
_REJECT = re.compile(rb'"[^"]*(?:""[^"]*)*"\n')
_TORN = re.compile(rb'(?:"[^"]*(?:""[^"]*)*"?)?')


class Output:
    """An open output CSV with `done` rows in it; made by `open_output`."""

    def __init__(self, path: Path, descriptor: int, done: int):
        self.path, self.done = path, done
        self._descriptor = descriptor

    def append(self, rows: Sequence[Row]) -> None:
        """Write the next rows at once and wait until they are on disk. Raises UserError if that fails."""
        self.write("".join(map(format_row, rows)))
        self.done += len(rows)

    def write(self, text: str) -> None:
        """Write whole records; if that fails, the file stays as it was."""
        try:
            append_whole(self._descriptor, text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); the finished rows are saved: {remedy(error)}, "
                            "then the same command continues from there") from error


@contextmanager
def open_output(path: str | Path, settings: dict[str, Any], rows: Iterable[tuple[int, Row]]) -> Iterator[Output]:
    """Start the output, or continue that of an earlier run; an output without a row is started again.

    If the block ends with an error before the first row, both files are removed, so that other flags can be used next.

    Args:
        settings: everything that answers depend on; must equal that of the earlier run.
        rows: all rows of the output, each with the number, for messages, of the input's row that it is made from. A reject that
            is to be drawn is "", any other is in the output as it is.

    Raises:
        UserError: `path` does not hold the beginning of this output, or another run is writing it.
    """
    path = Path(path)
    if not path.exists() and _sidecar_path(path).exists():
        _check_settings(path, {})
    with open_alone(path, "--output_csv") as descriptor:
        done, found = 0, os.fstat(descriptor).st_size
        if found:
            with path.open("rb") as file:
                done, size = read_progress(file, rows, path)
            _check_settings(path, settings if done else {})
        size = size if done else 0
        if size < found:
            cut_back(descriptor, size, path)
        output = Output(path, descriptor, done)
        try:
            if not done:
                _write_sidecar(path, settings)
                output.write(HEADER)
            yield output
        except BaseException:
            if not output.done:
                for made in (_sidecar_path(path), path):
                    regular_file(made).unlink(missing_ok=True)  # for a link, its target
            raise


def write_summary(path: str | Path, settings: dict[str, Any], summary: dict[str, Any]) -> None:
    """Add the summary to the sidecar of a finished output."""
    _write_sidecar(Path(path), settings | {"summary": summary})


def read_progress(file: IO[bytes], rows: Iterable[tuple[int, Row]], path: Path) -> tuple[int, int]:
    """The number of complete rows in an output, and their size in bytes with the header; a cut-off record may follow.

    Args:
        file: at its beginning; no more than a record of it is in memory.
        rows: as in `open_output`.

    Raises UserError if `file` is not the beginning of the output for these rows.
    """
    header = HEADER.encode()
    found = file.read(len(header))
    if found != header:
        if header.startswith(found):
            return 0, 0
        raise UserError(f"{path}: does not begin with {HEADER.strip()}, so it was not written by this script; {_ANOTHER}")
    done, size = 0, len(header)
    for source, row in counting(f"{path}: rows checked", rows):
        record = _read_record(file, row)
        if record is None:
            raise UserError(f"{path}: its row {done + 1} was not made from row {source} of --input_csv as it is now; {_ANOTHER}")
        if not record:
            return done, size
        done, size = done + 1, size + record
    if file.read(1):
        raise UserError(f"{path}: has more rows than the {done} that --input_csv makes; {_ANOTHER}")
    return done, size


def _read_record(file: IO[bytes], row: Row) -> int | None:
    """The bytes of the row's record, which is next in `file`: 0 if it is cut off, None if something else is there."""
    expected = format_row(row).encode()
    if not row.reject:
        expected = expected.removesuffix(b'""\n')  # only the output has the reject
    found = file.read(len(expected))
    if found != expected:
        return 0 if expected.startswith(found) else None
    if row.reject:
        return len(expected)
    reject = _read_reject(file)
    if reject == b'""\n' or not _REJECT.fullmatch(reject):
        return 0 if _TORN.fullmatch(reject) else None
    return len(expected) + len(reject)


def _read_reject(file: IO[bytes]) -> bytes:
    """The lines up to the first that ends outside of quotes, or to the file's end."""
    reject = bytearray(file.readline())
    quotes = reject.count(b'"')
    while quotes % 2 and (line := file.readline()):
        reject += line
        quotes += line.count(b'"')
    return bytes(reject)


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    sidecar = _sidecar_path(path)
    try:
        found = parse_json(sidecar.read_bytes(), REJECTS)
    except FileNotFoundError:
        raise UserError(f"{path}: exists without the {sidecar.name} that says how it was made; {_ANOTHER}") from None
    except BadJson as error:
        raise UserError(f"{sidecar}: is damaged, or not of {path.name} ({error}); {_ANOTHER}") from None
    if isinstance(found["stop"], str) and "stop" in settings:  # of a file from before there could be several
        found["stop"] = [found["stop"]] if found["stop"] else []
    differing = [f"{name} {reprlib.repr(found.get(name))} (now {reprlib.repr(value)})" for name, value in settings.items()
                 if name != "template" and (name not in found or found[name] != value)]
    if "template" in settings and (other := difference(recorded_in(found), settings["template"])):
        differing.insert(0, f"template {other}")
    if differing:
        raise UserError(f"{path}: was started with {', '.join(differing)}; give the same to continue, or {_ANOTHER}")


def _write_sidecar(path: Path, content: dict[str, Any]) -> None:
    text = json_text(content, _sidecar_path(path), indent=2, ensure_ascii=False)
    with atomic_write(_sidecar_path(path)) as file:
        file.write(text.encode() + b"\n")


def _sidecar_path(path: Path) -> Path:
    return Path(f"{path}.json")
