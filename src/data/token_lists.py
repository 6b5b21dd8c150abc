"""Token lists that may be too many for memory, and the pairs and texts made of them: sequences that know all lengths.

What a sequence gives is a new object each time. Pairs that share a list of tokens have the same number for it.
"""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from src.data.packing import Sizes, Text, sizes_of_pairs, sizes_of_texts
from src.data.spill import BLOCK, Storage, Stored
from src.progress import bar_if_long

EMPTY = 0


class TokenPair(NamedTuple):
    """A prompt with its two answers, as tokens. With one answer empty it is a thumb: up without reject, down without chosen."""

    prompt: list[int]
    chosen: list[int]
    reject: list[int]
    chosen_from: int = 0  # tokens of chosen before this one have no loss
    reject_from: int = 0


class TokenLists(Stored[list[int]]):
    """Lists of tokens, in the order in which they were appended.

    Args:
        vocab_size: all tokens are below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._kind = "H" if vocab_size <= 1 << 16 else "I"
        self._size = array(self._kind).itemsize
        self._storage, self._ends = Storage(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, tokens: Sequence[int]) -> int:
        """The list's number."""
        self._storage.append(array(self._kind, tokens).tobytes())
        self._ends.append(self._ends[-1] + len(tokens))
        return len(self) - 1

    def length(self, number: int) -> int:
        return self._ends[number + 1] - self._ends[number]

    def lengths(self) -> np.ndarray:
        """[n] int64"""
        return np.diff(np.frombuffer(self._ends, np.int64))

    def bytes_of(self, number: int) -> bytes:
        """A list's tokens in as many bytes each as the vocabulary needs."""
        return self._storage.read(self._size * self._ends[number], self._size * self._ends[number + 1])

    def add_to(self, digest: Any) -> None:
        """Update a digest of hashlib with all of the lists."""
        digest.update(self._ends)
        for start in range(0, self._storage.size, BLOCK):
            digest.update(self._storage.read(start, min(start + BLOCK, self._storage.size)))

    def _item(self, at: int) -> list[int]:
        return array(self._kind, self.bytes_of(at)).tolist()


class SharedLists(TokenLists):
    """Lists that pairs refer to by their numbers; the empty list has number EMPTY."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        super().append([])

    def append(self, tokens: Sequence[int]) -> int:
        """The list's number."""
        return super().append(tokens) if len(tokens) else EMPTY


class TokenPairs(Stored[TokenPair]):
    """Pairs of lists that are in `lists`, which several pairs may share.

    Args:
        columns: of n pairs, [n] each: the numbers of their prompts, chosen answers and rejects, `chosen_from` and `reject_from`.
    """

    def __init__(self, lists: SharedLists, *columns: np.ndarray) -> None:
        self.lists = lists
        self._columns = [array("i", column.astype(np.int32).tobytes()) for column in columns] or [array("i") for _ in range(5)]

    def __len__(self) -> int:
        return len(self._columns[0])

    def append(self, prompt: int, chosen: int, reject: int, chosen_from: int = 0, reject_from: int = 0) -> None:
        """Append a pair, whose lists are given by their numbers."""
        for column, number in zip(self._columns, (prompt, chosen, reject, chosen_from, reject_from), strict=True):
            column.append(number)

    def numbers(self, at: int) -> list[int]:
        """Of a pair, in the order of the arguments of `append`."""
        return [column[at] for column in self._columns]

    def columns(self) -> list[np.ndarray]:
        """[n] int32 each, in the order of the arguments of `append`."""
        return [np.array(column, np.int32) for column in self._columns]

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n] int64 each: tokens of the prompts, of the chosen and of the rejected answers."""
        of_lists = self.lists.lengths()
        prompt, chosen, reject = (of_lists[numbers] for numbers in self.columns()[:3])
        return prompt, chosen, reject

    def sizes(self) -> Sizes:
        """See `sizes_of`."""
        numbers, which = np.unique(self.columns()[0], return_inverse=True)
        texts = (self.lists.bytes_of(number) for number in numbers.tolist())
        same = np.unique(digests_of(texts, "prompts compared", len(numbers)), return_inverse=True)[1]
        return sizes_of_pairs(*self.lengths(), same[which])

    def distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """The places of all different pairs, of equal ones that of the first; for each pair, the number of its place there."""
        pairs = (self._bytes_of(at) for at in range(len(self)))
        _, first, which = np.unique(digests_of(pairs, "pairs compared", len(self)), return_index=True, return_inverse=True)
        order = np.argsort(first)
        return first[order], np.argsort(order)[which]

    def _bytes_of(self, at: int) -> bytes:
        """All of a pair: the lengths of its lists keep these apart."""
        prompt, chosen, reject, *starts = self.numbers(at)
        texts = [self.lists.bytes_of(number) for number in (prompt, chosen, reject)]
        return array("q", [*map(len, texts), *starts]).tobytes() + b"".join(texts)

    def _item(self, at: int) -> TokenPair:
        prompt, chosen, reject, chosen_from, reject_from = self.numbers(at)
        return TokenPair(self.lists[prompt], self.lists[chosen], self.lists[reject], chosen_from, reject_from)


class Texts(Stored[Text]):
    """Texts with what of them has a loss.

    Args:
        vocab_size: all tokens are below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._lists, self._losses = TokenLists(vocab_size), array("q")
        self._trained, self._ends = Storage(), array("q", [0])  # a bit for each token, each text in bytes of its own

    def __len__(self) -> int:
        return len(self._losses)

    def append(self, text: Text) -> None:
        self._lists.append(text.tokens)
        self._losses.append(sum(text.trained[1:]))
        self._trained.append(np.packbits(text.trained).tobytes())
        self._ends.append(self._trained.size)

    def losses(self) -> np.ndarray:
        """[n] int64: tokens of each text that have a loss."""
        return np.frombuffer(self._losses, np.int64)

    def sizes(self) -> Sizes:
        """See `sizes_of`."""
        return sizes_of_texts(self._lists.lengths())

    def _item(self, at: int) -> Text:
        bits = np.frombuffer(self._trained.read(self._ends[at], self._ends[at + 1]), np.uint8)
        tokens = self._lists[at]
        return Text(tokens, np.unpackbits(bits, count=len(tokens)).astype(bool).tolist())


def digests_of(texts: Iterable[bytes], what: str, count: int) -> np.ndarray:
    """[count] 16 bytes each, equal for equal texts and not for others; `what` is for the progress bar."""
    digests = np.empty(count, "V16")
    with bar_if_long(what, count) as advance:
        for at, text in enumerate(texts):
            digests[at] = hashlib.blake2b(text, digest_size=16).digest()
            advance(1)
    return digests
