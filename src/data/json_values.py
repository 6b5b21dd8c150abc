"""The values of a JSON text one after another, decoded as the text is read: an object a line, any values, a list's items.

Rows are counted from 1, without blank lines.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.data.faults import BadRow
from src.data.json_window import Window, decode_line
from src.data.source import open_text, stray_byte
from src.errors import UserError

_LONGEST_ROW = 1 << 24  # characters; a longer line may be a whole table
_GOES_ON = re.compile(r"[\[{]$|[^}],$")  # how a line ends that an object goes on after


def has_row_a_line(path: Path) -> bool:
    """Whether there are several lines and any is a whole object, as in JSONL; not just the first, since that may be broken."""
    with open_text(path, newline="\n") as text:
        if Window(text).peek() == "[":
            return False
    with open_text(path, newline="\n") as text:
        lines, found, begins = 0, False, True
        for line in iter(lambda: text.readline(_LONGEST_ROW), ""):
            ends = line.endswith("\n")
            lines += begins and not line.isspace()
            if lines == 1 and begins and ends and _GOES_ON.search(line.rstrip()):
                return False
            found = found or (begins and _is_object(line))
            if found and lines > 1:
                return True
            begins = ends
    return False


def row_a_line(path: Path) -> Iterator[Any]:
    """The value of each line, or a BadRow."""
    with open_text(path, newline="\n") as text:
        lines = (stripped for line in text if (stripped := line.strip()))
        for number, line in enumerate(lines, start=1):
            try:
                where = f"{path}: row {number}"
                yield stray_byte(line, where) or decode_line(line.removesuffix(","), where)
            except BadRow as fault:
                yield fault


def one_after_another(path: Path) -> Iterator[Any]:
    """The items of a list, or values one after another, or a BadRow for bytes that are no text; a trailing comma is accepted.

    Raises UserError where one is broken, since where the next begins is then unknown.
    """
    with open_text(path, newline="\n") as text:
        window = Window(text)
        of_list, number = window.peek() == "[", 0
        if of_list:
            window.skip()
        while (begins := window.peek()) and not (of_list and begins == "]"):
            number += 1
            yield window.value(f"{path}: row {number}")
            follows = window.peek()
            if of_list and follows not in (",", "]", ""):
                raise UserError(f"{path}: row {number} is not JSON (a comma is expected after it in {window.line()}); put a "
                                "comma between the objects of a list")
            if follows == ",":
                window.skip()
        if of_list and not begins:
            raise UserError(f"{path}: the list does not end after row {number} (] is expected); the file seems to be cut off")
        if of_list:
            window.skip()
            if window.peek():
                raise UserError(f"{path}: something follows the list of rows in {window.line()}; keep one list in the file")


def _is_object(line: str) -> bool:
    found = re.match(r"\{.*\S", line)
    try:
        return found is not None and isinstance(json.loads(found[0].removesuffix(",")), dict)
    except (ValueError, RecursionError):
        return False
