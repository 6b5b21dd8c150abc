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
from pathlib import Path

from src.data.columns import Table
from src.data.faults import BadRow
from src.data.rows import Row
from src.data.source import TELLING_NAMES, stray_byte
from src.errors import UserError

HEADER = "prompt,chosen,reject\n"
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
# A first line that gives Excel the separator.
_SEP_LINE = re.compile(r'"?sep=([,;|\t])"?[,;|\t ]*(?:\r\n?|\n)', re.IGNORECASE)


def read_csv(text: str, path: Path, tabs_first: bool = False) -> Table:
    """The header's columns and the texts under them; a row that has more or fewer fields than the header is a `BadRow`.

    Args:
        text: of the file.
        path: for messages.
        tabs_first: whether the file's ending indicates tabs rather than commas.

    Raises:
        UserError: the file is empty, or a row has an unclosed quote, so that the ends of rows are unknown.
    """
    text, separator = _separator(text, tabs_first)
    records = _records(text, separator, path)
    if not records:
        raise UserError(f"{path}: the file is empty; it needs a header (prompt,chosen,reject) and a row for each prompt")
    names, words = [name.strip() for name in records[0]], _SEPARATORS[separator]
    if fault := stray_byte(" ".join(names), f"{path}: the header"):
        raise UserError(str(fault))

    def row(number: int, fields: list[str]) -> dict[str, str] | BadRow:
        if fault := stray_byte("".join(fields), f"{path}: row {number}"):
            return fault
        if len(fields) == len(names):
            return dict(zip(names, fields, strict=True))
        return BadRow("number of fields", f"{path}: row {number} has {len(fields)} fields where the header has {len(names)}, "
                                          f"separated by {words}; put texts that hold {words} or line breaks in double quotes")

    where = "the header" if separator == "," else f"the header (separated by {words})"
    return Table(path, where, names, [row(number, fields) for number, fields in enumerate(records[1:], start=1)])


def has_known_header(text: str) -> bool:
    """Whether a text begins with known column names, by any of the supported separators."""
    text, separator = _separator(text, tabs_first=False)
    return _is_telling(_header(text, separator))


def format_row(row: Row) -> str:
    """One CSV record with its line ending, to be appended to a file that begins with `HEADER`.

    Every field is quoted, so that no text is mistaken for structure. NUL characters, which a model can write
    but most CSV readers refuse, become U+FFFD.
    """
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(text.replace("\0", "\ufffd") for text in row)
    return buffer.getvalue()


def _separator(text: str, tabs_first: bool) -> tuple[str, str]:
    """The text without a first line that only names the separator, and the separator.

    The separator is the first of the four that splits the header into names with a known one among them, else the first that
    splits it into several names, else the first.
    """
    said = _SEP_LINE.match(text)
    if said:
        return text[said.end():], said[1]
    order = sorted(_SEPARATORS, key=lambda separator: separator != "\t") if tabs_first else list(_SEPARATORS)
    headers = {separator: _header(text, separator) for separator in order}
    telling = [separator for separator, names in headers.items() if _is_telling(names)]
    several = [separator for separator, names in headers.items() if len(names) > 1]
    return text, [*telling, *several, *order][0]


def _is_telling(names: list[str]) -> bool:
    return any(name.strip().lower() in TELLING_NAMES for name in names)


def _header(text: str, separator: str) -> list[str]:
    with _fields_of_any_length(text):
        return next(filter(None, csv.reader(_lines(text), delimiter=separator)), [])


def _records(text: str, separator: str, path: Path) -> list[list[str]]:
    """All records, the header first, blank lines left out."""
    records: list[list[str]] = []
    try:
        _parse(_without_outer_spaces(text, separator), separator, records, strict=True)
    except csv.Error as error:
        reason = str(error).replace("\t", "tab")
        raise UserError(f"{path}: {_place(len(records))}: a quoted field is not closed properly ({reason}); "
                        "write a double quote inside a quoted text twice") from None
    return records


def _parse(text: str, separator: str, records: list[list[str]], strict: bool) -> None:
    """Append to `records`, which on an error keeps the complete records before it."""
    with _fields_of_any_length(text):
        for fields in csv.reader(_lines(text), delimiter=separator, strict=strict):
            if fields:
                records.append(fields)


def _without_outer_spaces(text: str, separator: str) -> str:
    """The text without spaces between a field's quotes and its separators, as in `"a", "b"`.

    The csv module would read such quotes as part of an unquoted text. Spaces around unquoted texts stay, and so do those before
    a quote that does not close where the field ends.
    """
    ends = rf"[{re.escape(separator)}\r\n]"
    if not re.search(rf'(?:{ends}|\A) +"|" +(?:{ends}|\Z)', text):
        return text
    kept, end = [], 0
    for field in re.finditer(rf'(?:{ends}|\A)( *)("[^"]*+(?:""[^"]*+)*+")( *)(?={ends}|\Z)', text):
        if field[1] or field[3]:
            kept += [text[end:field.start(1)], field[2]]
            end = field.end()
    return "".join([*kept, text[end:]]) if kept else text


def _lines(text: str) -> Iterator[str]:
    """Lines with their endings, one at a time; io.StringIO would keep a copy of four bytes a character."""
    return (line[0] for line in re.finditer(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+", text))


@contextmanager
def _fields_of_any_length(text: str) -> Iterator[None]:
    # The csv module's limit of 131072 characters a field is process-wide, so it is restored afterwards.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _place(index: int) -> str:
    return f"row {index}" if index else "the header"
