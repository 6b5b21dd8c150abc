"""The forms in which one JSON object holds a whole table: rows under a key, columns, and what pandas calls orients."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from src.data.faults import BadRow
from src.data.json_object import Members
from src.data.messages import shown
from src.data.source import TELLING_NAMES
from src.data.spill import Spill
from src.errors import UserError
from src.progress import counting

_SPEAKERS = {"role", "from", "speaker", "author"}  # keys that identify a message, even those that are not supported
_OF_ROWS = TELLING_NAMES - {"text"} | {"input"}  # keys that no message has


def rows_in(whole: Members, path: Path) -> Iterable[Any] | None:
    """The rows of the table that an object holds; None if the object is a single row.

    Raises UserError, also while the rows are read: it holds several tables, or its columns differ in length.
    """
    lists: dict[str, Any] = {}
    objects = records = 0
    by_column = False
    for name, value in counting(f"{path}: keys compared", zip(*whole, strict=True)):
        if _is_of_a_row(name, value):
            return None
        by_column |= name.lower() in TELLING_NAMES
        if isinstance(value, list | Spill):
            lists[name] = value
        elif isinstance(value, dict | Members):
            objects += 1
            # The keys matter only where no member has the name of a column; the labels of a column's cells may be a million.
            records += not by_column and any(key.lower() in TELLING_NAMES for key in _members(value).names)
    names, data = lists.get("columns"), lists.get("data")
    if names is not None and data is not None and all(isinstance(row, list) for row in data[:1]):  # orient="split"
        return _split(names, data, path)
    tables = [name for name, value in lists.items() if value and isinstance(value[0], dict)]
    if len(tables) > 1:
        found = " ".join(", ".join(tables).split())[:200]
        raise UserError(f"{path}: holds several lists of rows ({found}); save the one to use as a file of its own")
    if tables:
        return lists[tables[0]]
    if len(lists) == len(whole.names) and any(lists.values()):
        return _side_by_side(lists, path)
    if objects == len(whole.names) and by_column:  # orient="columns"
        return _by_label(whole, path)
    if 0 < objects == len(whole.names) == records:  # orient="index"
        return (dict(zip(*_members(value), strict=True)) for value in whole.values)
    return None


def _split(names: Iterable[Any], data: Iterable[Any], path: Path) -> Iterator[dict[str, Any] | BadRow]:
    columns = list(map(str, names))
    name, times = Counter(columns).most_common(1)[0] if columns else ("", 0)
    if times > 1:
        raise UserError(f"{path}: its columns have the name {shown(name)} more than once; keep one of them")
    for number, row in enumerate(data, start=1):
        if not isinstance(row, list):
            yield BadRow("no list", f"{path}: row {number} is of type {type(row).__name__} where a list of values is expected")
        elif len(row) != len(columns):
            yield BadRow("number of values", f"{path}: row {number} has {len(row)} values where \"columns\" has {len(columns)}; "
                                             "make the numbers equal")
        else:
            yield dict(zip(columns, row, strict=True))


def _side_by_side(columns: dict[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    if len({len(cells) for cells in columns.values()}) > 1:
        counts = ", ".join(f"{len(cells)} of {' '.join(name.split())}" for name, cells in columns.items())[:200]
        raise UserError(f"{path}: its columns differ in length ({counts}); write an object for each row")
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _by_label(whole: Members, path: Path) -> Iterator[dict[str, Any]]:
    """Rows of columns whose cells have labels: the cells with the same label, in the order in which labels are first seen."""
    columns = [_members(value) for value in whole.values]
    rows: dict[str, int] = {}
    row_of = array("q")  # of each cell, column after column
    labels = chain.from_iterable(column.names for column in columns)
    row_of.extend(rows.setdefault(label, len(rows)) for label in counting(f"{path}: labels compared", labels))
    starts = np.array([0, *accumulate(len(column.names) for column in columns)])
    cells = np.argsort(np.array(row_of), kind="stable")
    ends = [0, *np.cumsum(np.bincount(row_of)).tolist()]
    del rows, row_of
    column_of = np.searchsorted(starts, cells, side="right") - 1
    places = cells - starts[column_of]
    for start, end in pairwise(ends):
        of_row = zip(column_of[start:end].tolist(), places[start:end].tolist(), strict=True)
        yield {whole.names[column]: columns[column].values[at] for column, at in of_row}


def _members(value: dict[str, Any] | Members) -> Members:
    return value if isinstance(value, Members) else Members(list(value), list(value.values()))


def _is_of_a_row(name: str, value: Any) -> bool:
    """Whether a member shows that its object is a single row: a text under the name of a column, or messages."""
    tells = name.lower() in TELLING_NAMES
    if isinstance(value, str):
        return tells
    if isinstance(value, dict | Members):
        return tells and not _SPEAKERS.isdisjoint(_members(value).names)
    return isinstance(value, list | Spill) and len(value) > 0 and all(
        isinstance(item, dict) and _SPEAKERS & item.keys() and (tells or not _OF_ROWS & {key.lower() for key in item})
        for item in value)
