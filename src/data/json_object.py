"""A JSON text that is one object, which may hold a whole table: no more of it is in memory at once than a piece or one row."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.data.faults import BadRow
from src.data.json_window import Window, repeated_key
from src.data.source import open_text
from src.data.spill import Spill
from src.progress import counting


class Members(NamedTuple):
    """The members of an object that may be too long for memory, in their order."""

    names: Sequence[str]
    values: Sequence[Any]


def read_object(path: Path) -> Members | None:
    """The object that is the whole text; None if the text begins with something else, or goes on after it.

    A value that is longer than a piece is a `Spill` instead of a list, and `Members` instead of a dict.

    Raises BadRow: it is not JSON, or has a repeated key or bytes that are no text.
    """
    with open_text(path, newline="\n") as text:
        window = Window(text)
        if window.peek() != "{":
            return None
        whole = _members(window, path, f"{path}: row 1", "keys", lambda name: _value(window, path, name))
        if window.peek() == ",":
            window.skip()
        return None if window.peek() else whole


def _value(window: Window, path: Path, name: str) -> Any:
    begins, short = window.peek(), _shown(name)
    if begins not in ("[", "{"):
        return _sound(window.value(f"{path}: row 1"))
    value = window.short_value()
    if value is not None:
        return value
    if begins == "{":
        return _members(window, path, f"{path}: {short}", f"values of {short}",
                        lambda key: _sound(window.value(f"{path}: {_shown(key)} of {short}")))
    items: Spill[Any] = Spill()
    places = _places(window, "]", f"{path}: {short}")
    for number, _ in enumerate(counting(f"{path}: values of {short} read", places), start=1):
        items.append(_sound(window.value(f"{path}: value {number} of {short}")))
    return items.finished()


def _members(window: Window, path: Path, where: str, what: str, read: Callable[[str], Any]) -> Members:
    """The members of the object that begins here, each value as `read(name)` reads it."""
    names: Spill[str] = Spill()
    values: Spill[Any] = Spill()
    known: set[str] = set()
    for _ in counting(f"{path}: {what} read", _places(window, "}", where)):
        if window.peek() != '"':
            raise window.fault("Expecting property name enclosed in double quotes", where)
        name = _sound(window.value(where))
        if name in known:
            raise repeated_key(repr(name), where)
        known.add(name)
        window.expect(":", where)
        names.append(name)
        window.peek()
        values.append(read(name))
    return Members(names.finished(), values.finished())


def _places(window: Window, end: str, where: str) -> Iterator[None]:
    """One None at each item of the list or object that begins here, for the caller to read it."""
    window.skip()
    if window.peek() != end:
        yield
        while window.peek() != end:
            window.expect(",", where)
            window.peek()
            yield
    window.skip()


def _sound(value: Any) -> Any:
    if isinstance(value, BadRow):
        raise value
    return value


def _shown(name: str) -> str:
    return repr(name)[:80]
