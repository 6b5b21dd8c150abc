"""The values of a JSON text one after another, decoded as the text is read: an object a line, any values, a list's items."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from src.data.faults import BadRow
from src.data.source import open_text, stray_byte
from src.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 18  # characters read at a time
_LONGEST_TOKEN = 16  # characters, more than any literal, escape or sign of an exponent has


def is_list(path: Path) -> bool:
    """Whether the text begins with a list."""
    with open_text(path, newline="\n") as text:
        return _Window(text).peek() == "["


def values(path: Path) -> Iterator[Any]:
    """The value of each row, or a BadRow. Rows are counted from 1, without blank lines.

    Raises UserError if the ends of rows are unknown.
    """
    with open_text(path, newline="\n") as text:
        if not _has_row_a_line(path):
            yield from _values_between(_Window(text), path)
            return
        lines = (stripped for line in text if (stripped := line.strip()))
        for number, line in enumerate(lines, start=1):
            try:
                where = f"{path}: row {number}"
                yield stray_byte(line, where) or _decode(_DECODER.decode, line.removesuffix(","), where)
            except BadRow as fault:
                yield fault


def _has_row_a_line(path: Path) -> bool:
    """Whether any line is a whole object, as in JSONL; not just the first, since that may be broken."""
    if is_list(path):
        return False
    with open_text(path, newline="\n") as text:
        for found in filter(None, (re.match(r"\{.*\S", line) for line in text)):
            try:
                json.loads(found[0].removesuffix(","))
                return True
            except (ValueError, RecursionError):
                continue
    return False


class _Window:
    """The part of a text that is being decoded, from `at` on."""

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self._text, self._at, self._ended = "", 0, False
        self._lines = self._column = 0  # line breaks before the part, characters since the last of them

    def peek(self) -> str:
        """The next character that is no space, "" at the end of the text."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None  # the pattern matches no space too
            self._at = found.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at:self._at + 1]
            self._read()

    def skip(self) -> None:
        """Go past the character that `peek` found."""
        self._at += 1

    def line(self) -> str:
        return f"line {self._lines + self._text.count(chr(10), 0, self._at) + 1}"

    def value(self, where: str) -> Any:
        """The value that begins here. Raises BadRow, beginning with `where`."""
        while True:
            try:
                value, end = _decode(_DECODER.raw_decode, self._text, where, self._at, self._may_go_on, self._lines, self._column)
            except _GoesOn:
                pass
            else:
                # A number may go on behind the part, even from `1` to `1.5` if the part ends in `1.`.
                if end < len(self._text) - _LONGEST_TOKEN or self._ended:
                    text, self._at = self._text[self._at:end], end
                    return stray_byte(text, where) or value
            self._read()

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        return not self._ended and (error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _LONGEST_TOKEN)

    def _read(self) -> None:
        """Forget what is before `at`, and read on: as much as is there, so that a long value is not decoded too often."""
        done, rest = self._text[:self._at], self._text[self._at:]
        breaks = done.count("\n")
        self._lines += breaks
        self._column = len(done) - done.rfind("\n") - 1 if breaks else self._column + len(done)
        piece = self._stream.read(max(_PIECE, len(rest)))
        self._text, self._at, self._ended = rest + piece, 0, not piece


def _values_between(window: _Window, path: Path) -> Iterator[Any]:
    """The items of a list, or values one after another; a trailing comma is accepted."""
    of_list, number = window.peek() == "[", 0
    if of_list:
        window.skip()
    while (begins := window.peek()) and not (of_list and begins == "]"):
        number += 1
        yield window.value(f"{path}: row {number}")
        follows = window.peek()
        if of_list and follows not in (",", "]", ""):
            raise UserError(f"{path}: row {number} is not JSON (a comma is expected after it in {window.line()}); put a comma "
                            "between the objects of a list")
        if follows == ",":
            window.skip()
    if of_list and not begins:
        raise UserError(f"{path}: the list does not end after row {number} (] is expected); the file seems to be cut off")
    if of_list:
        window.skip()
        if window.peek():
            raise UserError(f"{path}: something follows the list of rows in {window.line()}; keep one list in the file")


class _GoesOn(Exception):
    """The text may end within the value."""


class _RepeatedKey(ValueError):
    """The json module would silently keep the last value of a repeated key."""


def _decode(decode: Callable[..., Any], text: str, where: str, at: int | None = None,
            may_go_on: Callable[[json.JSONDecodeError], bool] = lambda error: False, lines: int = 0, column: int = 0) -> Any:
    """`decode(text, at)`, of a text with so many line breaks before it, and characters since the last of them.

    Raises BadRow, beginning with `where`, or _GoesOn.
    """
    try:
        return decode(text) if at is None else decode(text, at)
    except json.JSONDecodeError as error:
        if may_go_on(error):
            raise _GoesOn from None
        line = f"line {error.lineno + lines}, " if error.lineno + lines > 1 else ""
        place = error.colno + (column if error.lineno == 1 else 0)
        raise BadRow("not JSON", f"{where} is not JSON ({error.msg} at {line}character {place}); correct it, or write one "
                                 "object a line") from None
    except _RepeatedKey as error:
        raise BadRow("repeated key", f"{where} has the key {error} more than once; keep one of them") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deeply nested lists
        raise BadRow("not JSON", f"{where} can't be read as JSON ({type(error).__name__}); simplify it") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _RepeatedKey(repr(name)[:80])
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
