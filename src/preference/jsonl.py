"""Read JSON: an object a line (`.jsonl`), or one list of objects (`.json`, which may have either form).

The standard json module reads here rather than pandas, which drops half characters in silence, refuses whole numbers beyond 64
bits in columns that nobody asked for, and can't say in which row a file is broken. Rows are counted from 1, blank lines are not.
"""

import json
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import existing_file
from src.preference.columns import Table


def read_jsonl(path: str | Path) -> Table:
    """The objects of a file, what is null left out.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or not JSON, or a row is no object; file and row are named.
    """
    path = existing_file(path, "JSON file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = sum(bool(line.strip()) for line in data[:error.start].split(b"\n")[:-1]) + 1
        raise UserError(f"{path}: row {row}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; "
                        "save the file as UTF-8") from None
    if text.lstrip().startswith("["):
        records = _parsed(text, f"{path}: the file")
    else:
        lines = [line for line in text.split("\n") if line.strip()]
        records = [_parsed(line, f"{path}: row {number}") for number, line in enumerate(lines, start=1)]
    if not records:
        raise UserError(f"{path}: the file is empty; it needs an object with prompt, chosen and reject for each row")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f"{path}: row {number} is a {type(record).__name__} where an object with columns is expected")
    records = [{name: value for name, value in record.items() if value is not None} for record in records]
    return Table(path, "the rows", list(dict.fromkeys(name for record in records for name in record)), records)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at character {error.pos + 1}); write one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists within lists within lists
        raise UserError(f"{where} can't be read as JSON ({type(error).__name__}); simplify it") from None
