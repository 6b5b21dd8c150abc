"""Read and write the CSV of prompts, chosen and rejected answers.

The format is UTF-8 with or without a byte order mark, a header with at least `prompt,chosen`, fields quoted
where they hold commas, quotes or line breaks, and any of the three line endings. Data rows are counted from 1;
the header and blank lines are not counted, and every message that names a row counts this way.

The standard csv module reads here rather than pandas, which fills short rows up in silence, turns "NA" into a
missing value unless told otherwise, and counts lines where a person counts rows.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from src.errors import UserError
from src.files import atomic_write, existing_file
from src.preference.columns import Table
from src.preference.rows import Row

HEADER = "prompt,chosen,reject\n"


def read_csv(path: str | Path) -> Table:
    """The header's columns and the texts under them.

    Raises:
        UserError: the file is missing, empty or not UTF-8; a row has more or fewer fields than the header, or an unclosed
            quote. The message names the file and the row.
    """
    path = existing_file(path, "CSV file")
    records = _records(_decode(path), path)
    if not records:
        raise UserError(f"{path}: the file is empty; it needs a header (prompt,chosen,reject) and a row for each prompt")
    names = [name.strip() for name in records[0]]
    for number, fields in enumerate(records[1:], start=1):
        if len(fields) != len(names):
            raise UserError(f"{path}: row {number} has {len(fields)} fields where the header has {len(names)}; "
                            "put texts that hold commas or line breaks in double quotes")
    return Table(path, "the header", names, [dict(zip(names, fields, strict=True)) for fields in records[1:]])


def format_row(row: Row) -> str:
    """One CSV record, line ending included, such that a file grows by appending it after `HEADER`.

    Every field is quoted, so that no text is mistaken for structure. NUL characters, which a model can write
    and most CSV readers refuse, become U+FFFD.
    """
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(text.replace("\0", "\ufffd") for text in row)
    return buffer.getvalue()


def write_pairs_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a whole CSV at once, atomically. Raises UserError where the disk refuses."""
    with atomic_write(path) as file:
        file.write(HEADER.encode())
        for row in rows:
            file.write(format_row(row).encode())


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        place = _place_after(data[:error.start].decode())
        raise UserError(f"{path}: {place}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; "
                        "save the file as UTF-8") from None
    nul = text.find("\0")
    if nul >= 0:
        raise UserError(f"{path}: {_place_after(text[:nul])}: holds a NUL character; save the file as UTF-8 text")
    return text.removeprefix("\ufeff")


def _records(text: str, path: Path) -> list[list[str]]:
    """All records, the header first, blank lines left out."""
    records: list[list[str]] = []
    try:
        _parse(text, records, strict=True)
    except csv.Error as error:
        raise UserError(f"{path}: {_place(len(records))}: a quoted field is not closed as it should be ({error}); "
                        "a double quote inside a quoted text is written twice") from None
    return records


def _parse(text: str, records: list[list[str]], strict: bool) -> None:
    """Append to `records`, which keeps what was complete when an error ends the parsing."""
    # The limit of 131072 characters a field is the csv module's alone, and process-wide: lift it and put it back.
    limit = csv.field_size_limit(len(text) + 1)
    try:
        for fields in csv.reader(io.StringIO(text, newline=""), strict=strict):
            if fields:
                records.append(fields)
    finally:
        csv.field_size_limit(limit)


def _place_after(prefix: str) -> str:
    """The name of the record in which the character after `prefix` stands."""
    records: list[list[str]] = []
    _parse(prefix.removeprefix("\ufeff") + "?", records, strict=False)
    return _place(len(records) - 1)


def _place(index: int) -> str:
    return f"row {index}" if index else "the header"
