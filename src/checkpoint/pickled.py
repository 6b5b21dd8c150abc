"""Reads a pickle as data: no name in it is looked up, nothing is called, no object is built.

A pickle is a program for a small stack machine. This one runs the instructions that lists, tables, texts, numbers and PyTorch's
tensors need, and replaces everything that would be looked up, called or read from elsewhere by a description. Memory and time
are linear in the size of the data, even if hostile; a list that is the whole of a pickle can be read item by item. The
instructions are documented in the `pickletools` module.
"""

import re
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_INTEGER = re.compile(rb"K(.)|M(..)|J(....)", re.DOTALL)
_LINE = re.compile(rb"([^\n]{0,200})\n")
_EMPTY: dict[str, Callable[[], Any]] = {
    "]": list, "}": dict, ")": tuple, "N": lambda: None, "\x88": lambda: True, "\x89": lambda: False,
}
_TUPLES = {"t": None, "\x85": 1, "\x86": 2, "\x87": 3}
# Instructions with a size field: that many bytes of a value follow.
_SIZES = {"X": "<I", "\x8c": "<B", "U": "<B", "\x8a": "<B"}


class BadPickle(ValueError):
    """The message says what is wrong, without the file's name."""


class NamesCode(BadPickle):
    """The pickle names something that would be looked up or called."""

    def __init__(self, name: str):
        super().__init__(f"it names {name}")
        self.name = name


class NotSupported(BadPickle):
    """The pickle is valid, but its content is not supported; the message follows a file's name and says what to do."""


@dataclass(frozen=True, slots=True)
class Named:
    """A name that pickle would import, such as `torch.FloatStorage`."""

    name: str


@dataclass(frozen=True, slots=True)
class Stored:
    """An object stored outside of the pickle, by its description."""

    description: Any


@dataclass(frozen=True, slots=True)
class Kept:
    """A value that was handed on, by the number that the receiver gave it."""

    number: int


# Gets items of a list, and the place in the data after them; returns the numbers that it gives to them and to values within
# them, by `id`.
Receive = Callable[[list[Any], int], dict[int, int]]


class Reader:
    """Reads values one after another from `data`, any buffer of bytes; `at` is where the next one begins.

    `protocol` is the highest version of the format among the values read so far.

    Args:
        known: the names allowed in the data.
        describe: returns the replacement for a call, from its name and arguments.
        at, end: the part of the data to read; None for all.
    """

    def __init__(self, data: Any, known: frozenset[str], describe: Callable[[str, tuple], Any], at: int = 0,
                 end: int | None = None):
        self.data, self.known, self.describe, self.at = data, known, describe, at
        self._end = len(data) if end is None else end
        self.protocol = 0

    def read(self, receive: Receive | None = None) -> Any:
        """The next value. Raises NamesCode for a name that is not known, BadPickle for anything else that is wrong.

        Args:
            receive: gets the items of a list that begins the value, some at a time, and the list stays empty. Where the pickle
                refers to one of them again, or to something within, `Kept` is in its place if `receive` gave it a number.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._receive = receive
        # The numbers of what was handed on, by its place in the memo; -1 for anything else, which stays in the memo.
        self._kept, self._n_kept = array("q"), 0
        self._new: list[int] = []  # places in the memo since then
        try:
            while True:
                self._integers()
                code = chr(self._bytes(1)[0])
                if code == ".":
                    if len(self._stack) != 1 or self._marks:
                        raise BadPickle("its instructions make no value")
                    return self._stack[0]
                self._run(code)
        except (IndexError, KeyError, struct.error, UnicodeDecodeError):
            raise BadPickle("it is cut short, or its instructions make no value") from None

    def _integers(self) -> None:
        """Read a run of integers up to 32 bits at once; token lists are long runs of them."""
        scanner = _INTEGER.scanner(self.data, self.at, self._end)  # type: ignore[attr-defined]  # undocumented
        stack = self._stack
        while found := scanner.match():
            group = found.lastindex
            stack.append(int.from_bytes(found[group], "little", signed=group == 3))
            self.at = found.end()

    def _run(self, code: str) -> None:
        stack = self._stack
        if code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code == "(":
            self._marks.append(len(stack))
        elif code in _SIZES:
            stack.append(self._sized(code))
        elif code == "G":
            stack.append(self._unpack(">d"))
        elif code in _TUPLES:
            stack.append(tuple(self._items(_TUPLES[code])))
        elif code in "ae":
            items = self._items(1 if code == "a" else None)
            self._extend(self._top(list), items)
        elif code in "su":
            items = self._items(2 if code == "s" else None)
            self._set(items)
        elif code in "qr\x94":
            self._put(len(self._memo) + self._n_kept if code == "\x94" else self._unpack("<B" if code == "q" else "<I"))
        elif code in "hj":
            stack.append(self._again(self._unpack("<B" if code == "h" else "<I")))
        elif code in "c\x93":
            stack.append(self._name(code))
        elif code in "RQb":
            self._call(code)
        elif code == "\x80":
            self.protocol = max(self.protocol, self._bytes(1)[0])
        elif code == "\x95":  # a frame, a hint for reading ahead
            self._bytes(8)
        else:
            raise BadPickle(f"it has an instruction (0x{ord(code):02x}) that no table of tensors and no list of numbers needs")

    def _bytes(self, count: int) -> bytes:
        piece = bytes(self.data[self.at:min(self.at + count, self._end)])
        if len(piece) < count:
            raise BadPickle("it is cut short")
        self.at += count
        return piece

    def _unpack(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _sized(self, code: str) -> str | bytes | int:
        data = self._bytes(self._unpack(_SIZES[code]))
        if code == "\x8a":
            return int.from_bytes(data, "little", signed=True)
        return data if code == "U" else data.decode("utf-8", "surrogatepass")

    def _items(self, count: int | None) -> list[Any]:
        """Pop the topmost `count` values, or all above the last mark together with it."""
        lowest = self._marks[-1] if self._marks else 0
        at = self._marks.pop() if count is None else len(self._stack) - count
        if at < lowest:
            raise BadPickle("its instructions make no value")
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def _extend(self, into: list[Any], items: list[Any]) -> None:
        if self._receive is None or self._marks or len(self._stack) > 1:
            into.extend(items)
            return
        numbers = self._receive(items, self.at)
        for place in self._new:
            if place > self.at:  # the pickle module counts from 0, and each value takes some bytes
                raise BadPickle("its instructions make no value")
            self._kept.extend(array("q", [-1]) * (place + 1 - len(self._kept)))
            number = numbers.get(id(self._memo.get(place)), -1)
            if number >= 0:
                self._kept[place] = number
                self._n_kept += 1
                del self._memo[place]
        self._new.clear()

    def _put(self, place: int) -> None:
        self._memo[place] = self._top(object)
        if self._receive is not None:
            self._new.append(place)
            if place < len(self._kept) and self._kept[place] >= 0:
                self._kept[place] = -1
                self._n_kept -= 1

    def _again(self, place: int) -> Any:
        if place not in self._memo and place < len(self._kept) and self._kept[place] >= 0:
            return Kept(self._kept[place])
        value = self._memo[place]
        if self._receive is not None and value is self._stack[0]:
            raise BadPickle("it has a list that holds itself")
        return value

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise BadPickle("its instructions make no value")
        return self._stack[-1]

    def _set(self, items: list[Any]) -> None:
        table = self._top(dict)
        # Other keys are a danger to hash: endlessly nested tuples, large numbers that all have the same hash.
        if len(items) % 2 or not all(type(key) is str or (type(key) is int and abs(key) < 2**31) for key in items[::2]):
            raise BadPickle("it has a table whose keys are no names")
        table.update(zip(items[::2], items[1::2], strict=True))

    def _name(self, code: str) -> Named:
        if code == "c":
            parts = []
            for _ in range(2):
                line = _LINE.match(self.data, self.at, self._end)
                if line is None:
                    raise BadPickle("it is cut short")
                parts.append(line[1].decode())
                self.at = line.end()
        else:
            parts = self._items(2)
            if not all(type(part) is str for part in parts):  # nested lists could have endless texts
                raise BadPickle("it has a name that is no text")
        name = ".".join(parts).removeprefix("__builtin__.").removeprefix("builtins.")
        if name not in self.known:
            raise NamesCode(name[:100])
        return Named(name)

    def _call(self, code: str) -> None:
        if code == "Q":
            self._stack.append(Stored(self._items(1)[0]))
            return
        what, argument = self._items(2)
        if code == "b":  # an object's further state, such as a table's version numbers
            if not isinstance(what, dict):
                raise BadPickle("it fills an object")
            self._stack.append(what)
            return
        if not isinstance(what, Named) or not isinstance(argument, tuple):
            raise BadPickle("it calls something that is not a name")
        self._stack.append(self.describe(what.name, argument))
