"""The part of a JSON text that is being decoded, so that a long text is never in memory at once."""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import IO, Any

from src.data.faults import BadRow
from src.data.source import stray_byte

_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 18  # characters read at a time
_LONGEST_TOKEN = 16  # characters, more than any literal, escape or sign of an exponent has


class Window:
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

    def expect(self, sign: str, where: str) -> None:
        """Go past this sign. Raises BadRow, beginning with `where`, if something else follows."""
        if self.peek() != sign:
            raise self.fault(f"Expecting '{sign}' delimiter", where)
        self.skip()

    def fault(self, message: str, where: str) -> BadRow:
        """What is wrong with the JSON here, in the words of the json module."""
        return _not_json(json.JSONDecodeError(message, self._text, self._at), where, self._lines, self._column)

    def value(self, where: str) -> Any:
        """The value that begins here; a BadRow if it has bytes that are no text. Raises BadRow. Both begin with `where`."""
        while True:
            try:
                value, end = self._decoded(where)
            except _GoesOn:
                self._read()
            else:
                text, self._at = self._text[self._at:end], end
                return stray_byte(text, where) or value

    def short_value(self) -> Any:
        """The list or object that begins here; None, and nothing is passed, if it is longer than a piece or has any fault."""
        if len(self._text) - self._at < _PIECE and not self._ended:
            self._read()
        try:
            value, end = self._decoded("")
        except (_GoesOn, BadRow):
            return None
        if stray_byte(self._text[self._at:end], ""):
            return None
        self._at = end
        return value

    def _decoded(self, where: str) -> tuple[Any, int]:
        """The value that begins here, and where it ends. Raises BadRow, and _GoesOn if the part may end within it."""
        value, end = _decode(_DECODER.raw_decode, self._text, where, self._at, self._may_go_on, self._lines, self._column)
        # A number may go on behind the part, even from `1` to `1.5` if the part ends in `1.`.
        if end >= len(self._text) - _LONGEST_TOKEN and not self._ended:
            raise _GoesOn
        return value, end

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


class _GoesOn(Exception):
    """The text may end within the value."""


class _RepeatedKey(ValueError):
    """The json module would silently keep the last value of a repeated key."""


def decode_line(text: str, where: str) -> Any:
    """The one value of a text. Raises BadRow, beginning with `where`."""
    return _decode(_DECODER.decode, text, where)


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
        raise _not_json(error, where, lines, column) from None
    except _RepeatedKey as error:
        raise repeated_key(str(error), where) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deeply nested lists
        raise BadRow("not JSON", f"{where} can't be read as JSON ({type(error).__name__}); simplify it") from None


def _not_json(error: json.JSONDecodeError, where: str, lines: int, column: int) -> BadRow:
    line = f"line {error.lineno + lines}, " if error.lineno + lines > 1 else ""
    place = error.colno + (column if error.lineno == 1 else 0)
    message = error.msg.removesuffix(" at")  # of "Unterminated string starting at"
    return BadRow("not JSON", f"{where} is not JSON ({message} at {line}character {place}); correct it, or write one object a "
                              "line")


def repeated_key(key: str, where: str) -> BadRow:
    return BadRow("repeated key", f"{where} has the key {key[:80]} more than once; keep one of them")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _RepeatedKey(repr(name))
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
