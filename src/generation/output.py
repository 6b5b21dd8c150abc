"""The growing output CSV: complete records only, in the input's order, each on disk before the next begins.

A record is compared byte for byte with what this module would write for the input's row. That shows where a
write was cut short, and whether the file belongs to another input. `OUTPUT.csv.json` keeps the settings, so that
one file never mixes answers of two models or two ways of sampling, and, once the file is complete, the summary
of the run that finished it.
"""

import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.checked_json import BadJson, parse_json
from src.data.csv import HEADER, Row, format_row
from src.data.load_template import REJECTS, difference, recorded_in
from src.errors import UserError
from src.files import append_whole, atomic_write, cut_back, json_text, open_alone, regular_file, remedy

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
def open_output(path: str | Path, settings: dict[str, Any], rows: Sequence[Row], kept: Sequence[bool],
                sources: Sequence[int] | None = None) -> Iterator[Output]:
    """Start the output, or continue that of an earlier run; an output without a row is started again.

    If the block ends with an error before the first row, both files are removed, so that other flags can be used next.

    Args:
        settings: everything that answers depend on; must equal that of the earlier run.
        rows: all rows of the input, each as often as the output has it.
        kept: for each row, whether its reject is copied to the output as it is.
        sources: for each row, its number in the input, from 0, for messages; None if the rows are the input's one to one.

    Raises:
        UserError: `path` does not hold the beginning of this output, or another run is writing it.
    """
    path = Path(path)
    if not path.exists() and _sidecar_path(path).exists():
        _check_settings(path, {})
    with open_alone(path, "--output_csv") as descriptor:
        data, done = path.read_bytes(), 0
        if data:
            done, size = read_progress(data, rows, kept, path, sources)
            _check_settings(path, settings if done else {})
        size = size if done else 0
        if size < len(data):
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


def read_progress(data: bytes, rows: Sequence[Row], kept: Sequence[bool], path: Path,
                  sources: Sequence[int] | None = None) -> tuple[int, int]:
    """The number of complete rows in an output, and their size in bytes with the header; a cut-off record may follow.

    Raises UserError if `data` is not the beginning of the output for these rows.
    """
    header = HEADER.encode()
    if not data.startswith(header):
        if header.startswith(data):
            return 0, 0
        raise UserError(f"{path}: does not begin with {HEADER.strip()}, so it was not written by this script; {_ANOTHER}")
    size = len(header)
    for number, (row, keep) in enumerate(zip(rows, kept, strict=True)):
        expected = format_row(row if keep else row._replace(reject="")).encode()
        if not keep:
            expected = expected.removesuffix(b'""\n')  # only the output has the reject
        if not data.startswith(expected, size):
            if expected.startswith(data[size:]):
                return number, size
            raise _mismatch(path, number, sources)
        end = size + len(expected)
        if not keep:
            reject = _REJECT.match(data, end)
            if not reject and _TORN.fullmatch(data, end):
                return number, size
            if not reject or reject[0] == b'""\n':
                raise _mismatch(path, number, sources)
            end = reject.end()
        size = end
    if len(data) > size:
        raise UserError(f"{path}: has more rows than the {len(rows)} that --input_csv makes; {_ANOTHER}")
    return len(rows), size


def _mismatch(path: Path, number: int, sources: Sequence[int] | None) -> UserError:
    source = (sources[number] if sources else number) + 1
    return UserError(f"{path}: its row {number + 1} was not made from row {source} of --input_csv as it is now; {_ANOTHER}")


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
