"""Reads JSON: an object a line (JSONL), objects one after another, a list of objects, or one object that holds such a table.

The standard json module is used instead of pandas, which silently drops half characters, refuses whole numbers beyond 64 bits
even in unused columns, and can't say which row is broken. Rows are counted from 1, without blank lines.
"""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from src.data.columns import Table
from src.data.faults import BadRow
from src.data.json_forms import rows_in
from src.data.json_object import read_object
from src.data.json_values import has_row_a_line, one_after_another, row_a_line
from src.data.source import is_missing, open_text
from src.data.spill import Spill
from src.errors import UserError
from src.progress import counting

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
    records: Spill[dict[str, Any] | BadRow] = Spill()
    names: dict[str, None] = {}
    of_faults = True  # all that there are so far
    for number, value in enumerate(counting(f"{path}: rows read", _values(path)), start=1):
        if isinstance(value, dict):
            value = {name: cell for name, cell in value.items() if not is_missing(cell)}
            names |= dict.fromkeys(value)
            of_faults = False
        elif not isinstance(value, BadRow):
            value = BadRow("no object", f"{path}: row {number} is of type {type(value).__name__} where an object with columns "
                                        "is expected")
        records.append(value)
    if not records:
        raise UserError(f"{path}: the file is empty; it needs an object with prompt, chosen and reject for each row")
    if of_faults:
        raise UserError(str(records[0]))
    return Table(path, "the file", list(names), records.finished())


def _values(path: Path) -> Iterable[Any]:
    """The value of each row, or a BadRow."""
    try:
        whole = read_object(path)
    except BadRow:
        if not has_row_a_line(path):
            raise
        return row_a_line(path)
    if whole is None:
        return row_a_line(path) if has_row_a_line(path) else one_after_another(path)
    rows = rows_in(whole, path)
    return one_after_another(path) if rows is None else rows
