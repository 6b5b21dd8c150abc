"""Reads JSON: an object a line (JSONL), objects one after another, a list of objects, or one object that holds such a table.

The standard json module is used instead of pandas, which silently drops half characters, refuses whole numbers beyond 64 bits
even in unused columns, and can't say which row is broken. Rows are counted from 1, without blank lines.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from src.data.columns import Table
from src.data.faults import BadRow
from src.data.source import TELLING_NAMES, is_missing, stray_byte
from src.errors import UserError

_SPEAKERS = {"role", "from", "speaker", "author"}  # keys that identify a message, even those that are not supported
_SPACE = re.compile(r"[ \t\r\n]*")
_BEGINNING = re.compile(r"\s*(?:\{\s*[\"'}]|\[\s*[\[{\"'\]])")


def looks_like_json(text: str) -> bool:
    """Whether a text begins like an object or a list, unlike a CSV's header."""
    return _BEGINNING.match(text) is not None


def read_json(text: str, path: Path) -> Table:
    """The objects of a file, without null and NaN; a row that is not an object is a `BadRow`.

    Raises:
        UserError: the file is empty, none of its rows is an object, or the ends of rows are unknown.
    """
    values = list(_values(text, path))
    if len(values) == 1 and isinstance(values[0], dict) and not _is_list(text):
        values = _rows_in(values[0], path)
    if not values:
        raise UserError(f"{path}: the file is empty; it needs an object with prompt, chosen and reject for each row")
    records: list[dict[str, Any] | BadRow] = []
    for number, value in enumerate(values, start=1):
        if isinstance(value, dict):
            value = {name: cell for name, cell in value.items() if not is_missing(cell)}
        elif not isinstance(value, BadRow):
            value = BadRow("no object", f"{path}: row {number} is a {type(value).__name__} where an object with columns is "
                                        "expected")
        records.append(value)
    if all(isinstance(record, BadRow) for record in records):
        raise UserError(str(records[0]))
    return Table(path, "the file", list(dict.fromkeys(name for record in records if isinstance(record, dict) for name in record)),
                 records)


def _values(text: str, path: Path) -> Iterator[Any]:
    """The value of each row, or a BadRow."""
    if not _has_row_a_line(text):
        yield from _values_between(text, path)
        return
    lines = (line.strip() for line in text.split("\n") if line.strip())
    for number, line in enumerate(lines, start=1):
        try:
            where = f"{path}: row {number}"
            yield stray_byte(line, where) or _decode(_DECODER.decode, line.removesuffix(","), where)
        except BadRow as fault:
            yield fault


def _values_between(text: str, path: Path) -> Iterator[Any]:
    """The items of a list, or values one after another; a trailing comma is accepted."""
    is_list = _is_list(text)
    at, number = _skip_space(text, _skip_space(text, 0) + is_list), 0
    while at < len(text) and not (is_list and text[at] == "]"):
        number += 1
        start, where = at, f"{path}: row {number}"
        value, at = _decode(_DECODER.raw_decode, text, where, at)
        yield stray_byte(text[start:at], where) or value
        at = _skip_space(text, at)
        comma = text.startswith(",", at)
        if is_list and not comma and text[at:at + 1] not in ("]", ""):
            raise UserError(f"{path}: row {number} is not JSON (a comma is expected after it in {_line(text, at)}); put a comma "
                            "between the objects of a list")
        at = _skip_space(text, at + comma)
    if is_list and at == len(text):
        raise UserError(f"{path}: the list does not end after row {number} (] is expected); the file seems to be cut off")
    rest = _skip_space(text, at + is_list)
    if rest < len(text):
        raise UserError(f"{path}: something follows the list of rows in {_line(text, rest)}; keep one list in the file")


def _decode(decode: Callable[..., Any], text: str, where: str, *at: int) -> Any:
    """`decode(text, *at)`. Raises BadRow, beginning with `where`."""
    try:
        return decode(text, *at)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise BadRow("not JSON", f"{where} is not JSON ({error.msg} at {line}character {error.colno}); correct it, or write one "
                                 "object a line") from None
    except _RepeatedKey as error:
        raise BadRow("repeated key", f"{where} has the key {error} more than once; keep one of them") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deeply nested lists
        raise BadRow("not JSON", f"{where} can't be read as JSON ({type(error).__name__}); simplify it") from None


class _RepeatedKey(ValueError):
    """The json module would silently keep the last value of a repeated key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _RepeatedKey(repr(name)[:80])
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _has_row_a_line(text: str) -> bool:
    """Whether any line is a whole object, as in JSONL; not just the first, since that may be broken."""
    if _is_list(text):
        return False
    for line in re.finditer(r"^\{.*\S", text, re.MULTILINE):
        try:
            json.loads(line[0].removesuffix(","))
            return True
        except (ValueError, RecursionError):
            continue
    return False


def _is_list(text: str) -> bool:
    return text.startswith("[", _skip_space(text, 0))


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None  # the pattern matches no space too
    return found.end()


def _line(text: str, at: int) -> str:
    return f"line {text.count(chr(10), 0, at) + 1}"


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
