"""Reads the pairs of a `.save` some at a time, so that they need not all be in memory. Nothing in the file is ever executed."""

import mmap
import os
import warnings
from pathlib import Path
from typing import IO, Any

import torch

from src.checkpoint.archive import Described, HasTensors, read_content
from src.checkpoint.pickled import BadPickle, Kept, NamesCode, NotSupported
from src.data.token_lists import SharedLists, TokenPairs
from src.errors import UserError, out_of_memory
from src.preference.entries import MORE, PARTS, checked_tokens, read_entry
from src.preference.stored import Pairs
from src.progress import bar_if_long

# Of what torch.save writes now, and of what it wrote before.
_BEGINNINGS = (b"PK\3\4", b"\x80")
_LONG = 20  # MB; more take some seconds
# What a `Kept` is, by the remainder of its number.
_TOKENS, _PAIR, _DICT, _KINDS = 0, 1, 2, 3
_NAMES = ("a list", "the whole", "a dict")


def read_entries(file: IO[bytes], path: Path, vocab_size: int) -> Pairs:
    """All pairs of a `.save`, each checked by itself.

    Args:
        file: the one at `path`, open for reading.

    Raises UserError if the file is damaged, holds anything but lists, numbers and tensors, or has a malformed pair.
    """
    try:
        content, pairs = _read(file, path, vocab_size)
    except UserError:
        raise
    except NamesCode as error:
        raise UserError(f"{path}: refused, since it names {error.name}; a .save holds only lists, numbers and tensors, "
                        "no numpy values and no code") from None
    except NotSupported as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # torch raises nearly anything on damaged bytes: KeyError, struct.error, RuntimeError, ...
        if out_of_memory(error):
            raise
        file.seek(0)
        if not file.read(4).startswith(_BEGINNINGS):
            raise UserError(f"{path}: is not a .save file; rlhf_dpo_generate_save.py makes one of preferences in CSV, JSONL, "
                            "Parquet and other forms") from None
        reason = f" ({error})" if isinstance(error, BadPickle) else ""
        raise UserError(f"{path}: cannot be read as a .save file{reason}; it is damaged or of another kind") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: holds a {type(content).__name__} where a list of pairs is expected; is it a .save file?")
    if not pairs:
        raise UserError(f"{path}: holds no pairs")
    return pairs


def _read(file: IO[bytes], path: Path, vocab_size: int) -> tuple[Any, Pairs]:
    """The content, of which a list may be without its items, and the pairs that it holds if it is a list."""
    size = os.fstat(file.fileno()).st_size
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    entries, done = _Entries(path, vocab_size), 0
    with bar_if_long(f"MB of {path.name}", size >> 20, size >> 20 > _LONG) as advance:

        def receive(items: list[Any], at: int) -> dict[int, int]:
            nonlocal done
            advance((at >> 20) - done)
            done = at >> 20
            return entries.receive(items)

        try:
            return read_content(file, data, receive=receive).value, entries.pairs
        except HasTensors:
            content, entries = _with_tensors(file, data, path), _Entries(path, vocab_size)
            if isinstance(content, list):
                entries.receive(content)
            return content, entries.pairs


def _with_tensors(file: IO[bytes], data: Any, path: Path) -> Any:
    """The whole content, its tensors loaded, all of them dense and on the CPU."""
    content = read_content(file, data)
    if any(tensor.dtype is None for tensor in content.tensors):
        raise UserError(f"{path}: {_place_of_other_form(content.value)} is a tensor in a form (sparse, quantized or without "
                        "data) that is not supported; a .save holds lists, numbers and plain tensors")
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of older kinds of files
        return torch.load(file, map_location="cpu", weights_only=True)


class _Entries:
    """The pairs received so far."""

    def __init__(self, path: Path, vocab_size: int):
        self._path, self._vocab_size = path, vocab_size
        self.pairs = Pairs(TokenPairs(SharedLists(vocab_size)))
        self._numbers: dict[int, int] = {}

    def receive(self, items: list[Any]) -> dict[int, int]:
        """Add pairs; the result has the numbers of them, their lists of tokens and their dicts, by `id`."""
        self._numbers = {}  # while `items` keeps the objects alive, an id is of one of them
        for entry in items:
            at = len(self.pairs)
            if isinstance(entry, Kept):
                self.pairs.append(self.pairs.numbered(self._number(entry, _PAIR, "a pair")))
                continue
            self._numbers[id(entry)] = _KINDS * at + _PAIR
            if isinstance(entry, list | tuple):
                for value in entry[3:5]:
                    self._check_number(value)
                if len(entry) == len(PARTS) + 1:
                    self._numbers[id(entry[5])] = _KINDS * at + _DICT
                    entry = *entry[:5], self._again(entry[5])
            self.pairs.append(read_entry(entry, at + 1, self._path, self._add))
        return self._numbers

    def _number(self, kept: Kept, kind: int, expected: str) -> int:
        """The number of something that is in the file before, too."""
        number, found = divmod(kept.number, _KINDS)
        if found != kind:
            raise UserError(f"{self._path}: pair {len(self.pairs) + 1} has {_NAMES[found]} of a pair before it again, where "
                            f"{expected} is expected")
        return number

    def _check_number(self, value: Any) -> None:
        if isinstance(value, Kept):
            self._number(value, _KINDS, "a number")

    def _add(self, tokens: Any, name: str) -> tuple[int, int]:
        """The number of a list of tokens, which is stored once, and its length."""
        if isinstance(tokens, Kept):
            number = self._number(tokens, _TOKENS, "a list of token ids")
        elif self._numbers.get(id(tokens), _PAIR) % _KINDS == _TOKENS:
            number = self._numbers[id(tokens)] // _KINDS
        else:
            number = self.pairs.lists.append(checked_tokens(tokens, name, self._vocab_size, len(self.pairs) + 1, self._path))
            self._numbers[id(tokens)] = _KINDS * number + _TOKENS
        return number, self.pairs.lists.length(number)

    def _again(self, more: Any) -> Any:
        """A dict that another pair has too."""
        if not isinstance(more, Kept):
            for name, value in more.items() if isinstance(more, dict) else ():
                if name != "kl":
                    self._check_number(value)
            return more
        pair = self.pairs.numbered(self._number(more, _DICT, "a dict"))
        return {name: Kept(_KINDS * pair.kl + _TOKENS) if name == "kl" else value
                for name, value in zip(MORE, pair[5:], strict=True) if value}


def _place_of_other_form(content: Any) -> str:
    for number, entry in enumerate(content if isinstance(content, list) else (), start=1):
        if isinstance(entry, list | tuple) and len(entry) >= len(PARTS):
            more = entry[5] if len(entry) == len(PARTS) + 1 and isinstance(entry[5], dict) else {}
            for part, value in (*zip(PARTS, entry, strict=False), *((name, more.get(name)) for name in MORE)):
                if isinstance(value, Described) and value.dtype is None:
                    return f"the {part} of pair {number}"
    return "something in it"
