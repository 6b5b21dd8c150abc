"""Reads the CSV of prompts, chosen and rejected answers.

A CSV has a header with at least `prompt,chosen`, fields quoted where they hold separators, quotes or line breaks, and any of the
three line endings. Fields may also be separated by tabs, semicolons or vertical bars, as found in the header. Every message that
names a row counts data rows from 1, without the header and blank lines.

The standard csv module is used instead of pandas, which silently fills short rows, turns "NA" into a missing
value by default, and counts lines where a person counts rows.
"""

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from src.data.columns import Table
from src.data.faults import BadRow
from src.data.quotes import without_outer_spaces
from src.data.rows import Row
from src.data.source import TELLING_NAMES, open_text, stray_byte
from src.data.spill import Spill
from src.errors import UserError
from src.progress import counting

HEADER = "prompt,chosen,reject\n"
# Characters; without a limit, everything behind a quote that is not closed would be gathered in memory.
LONGEST_FIELD = 1 << 25
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
# A first line that gives Excel the separator.
_SEP_LINE = re.compile(r'"?sep=([,;|\t])"?[,;|\t ]*(?:\r\n?|\n)', re.IGNORECASE)


def read_csv(path: Path, tabs_first: bool = False) -> Table:
    """The header's columns and the texts under them; a row that has more or fewer fields than the header is a `BadRow`.

    Args:
        tabs_first: whether the file's ending indicates tabs rather than commas.

    Raises:
        UserError: the file is empty, or a row has an unclosed quote, so that the ends of rows are unknown.
    """
    separator, first_line = _separator(path, tabs_first)
    rows = _records(path, separator, first_line)
    header = next(rows, None)
    if header is None:
        raise UserError(f"{path}: the file is empty; it needs a header (prompt,chosen,reject) and a row for each prompt")
    names, words = [name.strip() for name in header], _SEPARATORS[separator]

    def record(number: int, fields: list[str]) -> dict[str, str] | BadRow:
        if fault := stray_byte("".join(fields), f"{path}: row {number}"):
            return fault
        if len(fields) == len(names):
            return dict(zip(names, fields, strict=True))
        return BadRow("number of fields", f"{path}: row {number} has {len(fields)} fields where the header has {len(names)}, "
                                          f"separated by {words}; put texts that hold {words} or line breaks in double quotes")

    numbered = enumerate(counting(f"{path}: rows read", rows), start=1)
    records = Spill(record(number, fields) for number, fields in numbered).finished()
    if fault := stray_byte(" ".join(names), f"{path}: the header"):
        raise UserError(str(fault))
    return Table(path, "the header" if separator == "," else f"the header (separated by {words})", names, records)


def has_known_header(path: Path) -> bool:
    """Whether a text begins with known column names, by any of the supported separators."""
    separator, first_line = _separator(path, tabs_first=False)
    return _is_telling(_header(path, separator, first_line))


def format_row(row: Row) -> str:
    """One CSV record with its line ending, to be appended to a file that begins with `HEADER`.

    Every field is quoted, so that no text is mistaken for structure. NUL characters, which a model can write
    but most CSV readers refuse, become U+FFFD.
    """
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(text.replace("\0", "\ufffd") for text in row)
    return buffer.getvalue()


def _separator(path: Path, tabs_first: bool) -> tuple[str, int]:
    """The separator, and the number of the header's first line, from 0: 1 if a line before it only names the separator.

    The separator is the first of the four that splits the header into names with a known one among them, else the first that
    splits it into several names, else the first.
    """
    if said := _SEP_LINE.match(next(_lines(path, 0), "")):
        return said[1], 1
    order = sorted(_SEPARATORS, key=lambda separator: separator != "\t") if tabs_first else list(_SEPARATORS)
    headers = {separator: _header(path, separator, 0) for separator in order}
    telling = [separator for separator, names in headers.items() if _is_telling(names)]
    several = [separator for separator, names in headers.items() if len(names) > 1]
    return [*telling, *several, *order][0], 0


def _is_telling(names: list[str]) -> bool:
    return any(name.strip().lower() in TELLING_NAMES for name in names)


def _header(path: Path, separator: str, first_line: int) -> list[str]:
    try:
        with _long_fields():
            return next(filter(None, csv.reader(_lines(path, first_line), delimiter=separator)), [])
    except csv.Error:  # `_records` says why it can't be read
        return []


def _records(path: Path, separator: str, first_line: int) -> Iterator[list[str]]:
    """All records, the header first, blank lines left out."""
    count = 0
    try:
        with _long_fields():
            for fields in csv.reader(without_outer_spaces(_lines(path, first_line), separator), delimiter=separator, strict=True):
                if fields:
                    yield fields
                    count += 1
    except csv.Error as error:
        reason = str(error).replace("\t", "tab")
        raise UserError(f"{path}: {_place(count)}: a quoted field is not closed properly ({reason}); "
                        "write a double quote inside a quoted text twice") from None


def _lines(path: Path, first: int) -> Iterator[str]:
    """Lines with their endings, from number `first` on."""
    with open_text(path, newline="") as text:
        yield from islice(text, first, None)


@contextmanager
def _long_fields() -> Iterator[None]:
    # The csv module's limit of 131072 characters a field is process-wide, so it is restored afterwards.
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _place(index: int) -> str:
    return f"row {index}" if index else "the header"
