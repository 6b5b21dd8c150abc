"""Reads JSON: an object a line (JSONL), objects one after another, a list of objects, or one object that holds such a table.

The standard json module is used instead of pandas, which silently drops half characters, refuses whole numbers beyond 64 bits
even in unused columns, and can't say which row is broken. Rows are counted from 1, without blank lines. Only an object that holds
a whole table is in memory at once.
"""

import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

from src.data.columns import Table
from src.data.faults import BadRow
from src.data.json_values import is_list, values
from src.data.source import TELLING_NAMES, is_missing, open_text
from src.data.spill import Spill
from src.errors import UserError
from src.progress import counting

_SPEAKERS = {"role", "from", "speaker", "author"}  # keys that identify a message, even those that are not supported
_BEGINNING = re.compile(r"\{[\"'}]|\[[\[{\"'\]]")


def looks_like_json(path: Path) -> bool:
    """Whether a text begins like an object or a list, unlike a CSV's header."""
    begins = ""  # the first two characters that are no spaces
    with open_text(path, newline="\n") as text:
        while len(begins) < 2 and (piece := text.read(1 << 16)):
            begins += "".join(islice((character for character in piece if not character.isspace()), 2))
    return _BEGINNING.match(begins) is not None


def read_json(path: Path) -> Table:
    """The objects of a file, without null and NaN; a row that is not an object is a `BadRow`.

    Raises:
        UserError: the file is empty, none of its rows is an object, or the ends of rows are unknown.
    """
    found: Iterable[Any] = values(path)
    first = list(islice(found, 2))
    if len(first) == 1 and isinstance(first[0], dict) and not is_list(path):
        first, found = [], _rows_in(first[0], path)
    records: Spill[dict[str, Any] | BadRow] = Spill()
    names: dict[str, None] = {}
    of_faults = True  # all that there are so far
    for number, value in enumerate(counting(f"{path}: rows read", chain(first, found)), start=1):
        if isinstance(value, dict):
            value = {name: cell for name, cell in value.items() if not is_missing(cell)}
            names |= dict.fromkeys(value)
            of_faults = False
        elif not isinstance(value, BadRow):
            value = BadRow("no object", f"{path}: row {number} is a {type(value).__name__} where an object with columns is "
                                        "expected")
        records.append(value)
    if not records:
        raise UserError(f"{path}: the file is empty; it needs an object with prompt, chosen and reject for each row")
    if of_faults:
        raise UserError(str(records[0]))
    return Table(path, "the file", list(names), records.finished())


def _rows_in(whole: dict[str, Any], path: Path) -> list[Any]:
    """The rows of a file that is one object: a single row, a list of rows under a key, or columns, including pandas' forms."""
    values = list(whole.values())
    if any(_are_messages(value) or (isinstance(value, str) and name.lower() in TELLING_NAMES) for name, value in whole.items()):
        return [whole]
    names, data = whole.get("columns"), whole.get("data")
    if isinstance(names, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):  # orient="split"
        return [_by_name(names, row, f"{path}: row {number}") for number, row in enumerate(data, start=1)]
    tables = [name for name, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(tables) > 1:
        found = " ".join(", ".join(tables).split())[:200]
        raise UserError(f"{path}: holds several lists of rows ({found}); save the one to use as a file of its own")
    if tables:
        return whole[tables[0]]
    if any(values) and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) > 1:
            counts = ", ".join(f"{len(value)} of {' '.join(name.split())}" for name, value in whole.items())[:200]
            raise UserError(f"{path}: its columns differ in length ({counts}); write an object for each row")
        return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) for value in values):
        if TELLING_NAMES & {name.lower() for name in whole}:  # orient="columns": by row label
            rows: dict[str, dict[str, Any]] = {}
            for name, column in whole.items():
                for label, value in column.items():
                    rows.setdefault(label, {})[name] = value
            return list(rows.values())
        if all(TELLING_NAMES & {name.lower() for name in value} for value in values):  # orient="index"
            return values
    return [whole]


def _by_name(names: list[Any], row: list[Any], where: str) -> dict[str, Any]:
    if len(row) != len(names):
        raise UserError(f"{where} has {len(row)} values for {len(names)} columns; make the numbers equal")
    return dict(zip(map(str, names), row, strict=True))


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and _SPEAKERS & item.keys() for item in value)
