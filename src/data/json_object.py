"""A JSON text that is one object, which may hold a whole table: its long lists and objects are read item by item, into files."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from src.data.faults import BadRow
from src.data.json_window import Window, repeated_key
from src.data.messages import shown
from src.data.source import open_text
from src.data.spill import Spill
from src.errors import UserError
from src.progress import counting

_SHARE = 16  # columns that can share the memory for what is not in files; most tables have fewer


class Members(NamedTuple):
    """The members of a long object, in their order."""

    names: Sequence[str]
    values: Sequence[Any]


def read_object(path: Path) -> Members | None:
    """The object that is the whole text; None if the text begins with something else, or goes on after it.

    In it a long list is a list or a `Spill`, and a long object is `Members`.

    Raises:
        BadRow: it is not JSON, or has a repeated key; where it would end is unknown.
        UserError: it has bytes that are no text.
    """
    with open_text(path, newline="\n") as text:
        window = Window(text)
        if window.peek() != "{":
            return None
        reader = _Reader(window, path)
        whole = reader.members(f"{path}: row 1", reader.member)
        if _next(window) == ",":
            window.skip()
        if _next(window):
            return None
    if reader.stray:
        raise UserError(str(reader.stray))
    return whole


def _next(window: Window) -> str:
    """The next character that is no white space, of any kind, since that may end a line in JSONL."""
    while window.peek().isspace():
        window.skip()
    return window.peek()


class _Reader:
    """Reads what begins at a window's place."""

    def __init__(self, window: Window, path: Path):
        self._window, self._path = window, path
        self._advance = partial(next, counting(f"{path}: values read", repeat(None)))  # one count of all, at any depth
        self.stray: BadRow | None = None  # the first value with bytes that are no text

    def member(self, name: str) -> Any:
        """The value of a member of the whole; of a long one the items are read one by one."""
        begins, of = self._window.peek(), shown(name)
        if begins not in ("[", "{"):
            return self._value(f"{self._path}: row 1")
        value = self._window.short_value()
        if value is not None:
            return value
        if begins == "{":
            return self.members(f"{self._path}: {of}", lambda key: self._value(f"{self._path}: {shown(key)} of {of}"))
        items: Spill[Any] = Spill(share=_SHARE)
        for number, _ in enumerate(self._places("]", f"{self._path}: {of}"), start=1):
            items.append(self._value(f"{self._path}: value {number} of {of}"))
        return items.finished()

    def members(self, where: str, read: Callable[[str], Any]) -> Members:
        """The members of an object, each value as `read(name)` reads it."""
        names: Spill[str] = Spill(share=_SHARE)
        values: Spill[Any] = Spill(share=_SHARE)
        known: set[str] = set()
        for _ in self._places("}", where):
            if self._window.peek() != '"':
                raise self._window.fault("Expecting property name enclosed in double quotes", where)
            name = self._value(where)
            if name in known:
                raise repeated_key(repr(name), where)
            known.add(name)
            names.append(name)
            self._window.expect(":", where)
            self._window.peek()
            values.append(read(name))
        return Members(names.finished(), values.finished())

    def _places(self, end: str, where: str) -> Iterator[None]:
        """One None at the place of each item of a list or object, for the caller to read it."""
        window = self._window
        window.skip()
        if window.peek() != end:
            self._advance()
            yield
            while window.peek() != end:
                window.expect(",", where)
                window.peek()
                self._advance()
                yield
        window.skip()

    def _value(self, where: str) -> Any:
        value = self._window.value(where)
        if isinstance(value, BadRow):
            self.stray = self.stray or value
        return value
