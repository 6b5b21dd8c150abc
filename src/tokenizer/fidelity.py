"""Finds texts that do not come back from their tokens as written, so that no letter is lost silently.

A vocabulary may lack letters, and a tokenizer may discard case, accents or white space; World and bytes keep everything.
"""

from collections import Counter
from dataclasses import dataclass

from src.console import say
from src.tokenizer.base import Tokenizer

NAMED_CHARACTERS, NAMED_ROWS = 10, 20


@dataclass(frozen=True)
class Changes:
    """What a tokenizer changes in a file's texts."""

    looked_at: int = 0
    texts: int = 0  # how many of these come back changed
    rows: tuple[int, ...] = ()  # the first NAMED_ROWS rows with such a text
    lost: str = ""  # characters that do not come back, those missing in the most texts first
    example: str = ""  # the first such text and its change

    def report(self, path: str, tokenizer: str) -> None:
        """One line on stderr, if any text is changed."""
        if self.texts:
            lost = f"; lost in all: {_quoted(self.lost)}" if self.texts > 1 and self.lost else ""
            say(f"warning: {path}: {self.texts} of {self.looked_at} texts do not come back from the tokens of {tokenizer} as "
                f"written; the first is {self.example}{lost}; choose a --tokenizer that keeps them, or change the texts")


class _Marks:
    """A set of places (part, row), in a bit each where rows follow one another."""

    def __init__(self) -> None:
        self._bits: dict[tuple[str, int], int] = {}
        self.count = 0

    def add(self, part: str, row: int) -> bool:
        """Whether the place is new."""
        key, bit = (part, row >> 10), 1 << (row & 1023)
        marked = self._bits.get(key, 0)
        if marked & bit:
            return False
        self._bits[key] = marked | bit
        self.count += 1
        return True


class Encoder:
    """Encodes a file's texts, and records which of them do not come back from their tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._seen, self._changed = _Marks(), _Marks()
        self._rows: list[int] = []  # the first with a change, in order
        self._first: tuple[int, str, str] | None = None  # row, part and difference
        self._lost: Counter[str] = Counter()

    def encode(self, text: str, row: int, part: str, continues: bool = False) -> list[int]:
        """`Tokenizer.encode` of a row's text.

        Args:
            row: counted from 1.
            part: names the text among the row's texts; a text that is encoded in several forms counts once.
        """
        tokens = self.tokenizer.encode(text, continues)
        if self.tokenizer.lossless:
            return tokens
        self._seen.add(part, row)
        back = self.tokenizer.decode_bytes(tokens).decode("utf-8", errors="replace")
        # The tokenizer itself may prepend a space to a whole text.
        if back != text and (continues or text not in (back.removeprefix(" "), self.tokenizer.decode(tokens))):
            lost = Counter(text) - Counter(back)
            if self._changed.add(part, row):
                self._lost.update(lost.keys())
                if self._first is None or (row, part) < self._first[:2]:
                    self._first = row, part, _difference(text, back, "".join(lost))
                if row not in self._rows and (len(self._rows) < NAMED_ROWS or row < self._rows[-1]):
                    self._rows = sorted([*self._rows, row])[:NAMED_ROWS]
        return tokens

    def control(self, word: str) -> int:
        """The token of a control word."""
        return self.tokenizer.control[word]

    def changes(self) -> Changes:
        """The changes of all texts so far."""
        example = "row {}'s {}, {}".format(*self._first) if self._first else ""
        lost = "".join(character for character, _ in self._lost.most_common())
        return Changes(self._seen.count, self._changed.count, tuple(self._rows), lost, example)


def _difference(text: str, back: str, lost: str) -> str:
    if lost:
        return f"which loses {_quoted(lost)}"
    at = next((at for at, (one, other) in enumerate(zip(text, back, strict=False)) if one != other), min(len(text), len(back)))
    return f"where {text[max(0, at - 10):at + 10]!r} becomes {back[max(0, at - 10):at + 10]!r}"


def _quoted(characters: str) -> str:
    return ", ".join(map(repr, characters[:NAMED_CHARACTERS])) + (", ..." if len(characters) > NAMED_CHARACTERS else "")
