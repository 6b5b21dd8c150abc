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
from typing import NamedTuple

from src.errors import UserError
from src.files import atomic_write, existing_file

HEADER = "prompt,chosen,reject\n"
_GENERATE = "run rlhf_generate_reject_csv.py to have the base model write it"


class Row(NamedTuple):
    """One data row, its texts just as they stand in the file; `reject` is "" where the file has none."""

    prompt: str
    chosen: str
    reject: str


def read_pairs_csv(path: str | Path, require_reject: bool) -> list[Row]:
    """Read all rows of a pairs CSV; further columns are ignored, and the columns may stand in any order.

    Args:
        path: the file.
        require_reject: True where every row must have a rejected answer; False where the column may be
            empty or absent, as it is before reject generation.

    Raises:
        UserError: the file is missing, empty, without data rows or not UTF-8; a column is missing; a row has
            more or fewer fields than the header, an unclosed quote, or a prompt or answer of nothing but
            whitespace. The message names the file and the row.
    """
    path = existing_file(path, "CSV file")
    records = _records(_decode(path), path)
    if not records:
        raise UserError(f"{path}: the file is empty; it needs a header (prompt,chosen,reject) and a row for each prompt")
    names = [name.strip() for name in records[0]]
    columns = _columns(names, require_reject, path)
    if len(records) == 1:
        raise UserError(f"{path}: there is no data row under the header")

    rows = []
    for number, fields in enumerate(records[1:], start=1):
        if len(fields) != len(names):
            raise UserError(f"{path}: row {number} has {len(fields)} fields where the header has {len(names)}; "
                            "put texts that hold commas or line breaks in double quotes")
        row = Row(*(fields[column] if column is not None else "" for column in columns))
        for name in ("prompt", "chosen"):
            if not getattr(row, name).strip():
                raise UserError(f"{path}: row {number} has an empty {name}; fill it in or remove the row")
        if require_reject and not row.reject.strip():
            raise UserError(f"{path}: row {number} has no reject; {_GENERATE}")
        rows.append(row)
    return rows


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


def _columns(names: list[str], require_reject: bool, path: Path) -> list[int | None]:
    """Where prompt, chosen and reject stand among the header's names; None for a reject that may be absent."""
    for name in Row._fields:
        if names.count(name) > 1:
            raise UserError(f"{path}: the header has the column {name} more than once")
    found = " ".join(", ".join(names).split())[:200]  # one line, whatever the file holds
    required = Row._fields if require_reject else ("prompt", "chosen")
    missing = [name for name in required if name not in names]
    if missing == ["reject"]:
        raise UserError(f"{path}: there is no reject column (found: {found}), so row 1 has no reject; {_GENERATE}")
    if missing:
        raise UserError(f"{path}: the header lacks {' and '.join(missing)} (found: {found}); "
                        "the first line must be prompt,chosen,reject")
    return [names.index(name) if name in names else None for name in Row._fields]
