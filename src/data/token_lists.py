"""Token lists that may be too many for memory, and the pairs and texts made of them: sequences that know all lengths.

What a sequence gives is a new object each time. Pairs that share a list of tokens have the same number for it.
"""

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from src.data.packing import Sizes, Text, prompt_key, sizes_of_pairs, sizes_of_texts
from src.data.spill import Storage, Stored


class TokenPair(NamedTuple):
    """A prompt with its two answers, as tokens. With one answer empty it is a thumb: up without reject, down without chosen."""

    prompt: list[int]
    chosen: list[int]
    reject: list[int]
    chosen_from: int = 0  # tokens of chosen before this one have no loss
    reject_from: int = 0


class TokenLists(Stored[list[int]]):
    """Lists of tokens, each stored once, under a number.

    Args:
        vocab_size: all tokens are below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._kind = "H" if vocab_size <= 1 << 16 else "I"
        self._size = array(self._kind).itemsize
        self._storage, self._ends = Storage(), array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def is_in_memory(self) -> bool:
        return self._storage.is_in_memory

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

    def _item(self, at: int) -> list[int]:
        return array(self._kind, self._storage.read(self._size * self._ends[at], self._size * self._ends[at + 1])).tolist()


class TokenPairs(Stored[TokenPair]):
    """Pairs of lists that are in `lists`."""

    def __init__(self, lists: TokenLists) -> None:
        self.lists = lists
        self._prompts, self._chosen, self._reject = array("i"), array("i"), array("i")  # numbers in `lists`
        self._chosen_from, self._reject_from = array("i"), array("i")

    def __len__(self) -> int:
        return len(self._prompts)

    def append(self, prompt: int, chosen: int, reject: int, chosen_from: int = 0, reject_from: int = 0) -> None:
        """Append a pair, whose lists are given by their numbers."""
        for numbers, number in zip((self._prompts, self._chosen, self._reject, self._chosen_from, self._reject_from),
                                   (prompt, chosen, reject, chosen_from, reject_from), strict=True):
            numbers.append(number)

    def numbers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n] int32 each: the numbers in `lists` of the prompts, of the chosen and of the rejected answers."""
        prompts, chosen, reject = (np.frombuffer(x, np.int32) for x in (self._prompts, self._chosen, self._reject))
        return prompts, chosen, reject

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n] int64 each: tokens of the prompts, of the chosen and of the rejected answers."""
        of_lists = self.lists.lengths()
        prompt, chosen, reject = (of_lists[numbers] for numbers in self.numbers())
        return prompt, chosen, reject

    def sizes(self) -> Sizes:
        """See `sizes_of`."""
        distinct, which = np.unique(self.numbers()[0], return_inverse=True)
        keys = np.fromiter((prompt_key(self.lists[number]) for number in distinct.tolist()), np.int64, len(distinct))
        return sizes_of_pairs(*self.lengths(), keys[which])

    def finished(self) -> Sequence[TokenPair]:
        """The pairs: a list if they are few, in which lists of the same number are one object; else this."""
        if not self.lists.is_in_memory:
            return self
        lists = list(self.lists)
        return [TokenPair(lists[prompt], lists[chosen], lists[reject], *starts) for prompt, chosen, reject, *starts in zip(
            self._prompts, self._chosen, self._reject, self._chosen_from, self._reject_from, strict=True)]

    def _item(self, at: int) -> TokenPair:
        prompt, chosen, reject = (self.lists[numbers[at]] for numbers in (self._prompts, self._chosen, self._reject))
        return TokenPair(prompt, chosen, reject, self._chosen_from[at], self._reject_from[at])


class Texts(Stored[Text]):
    """Texts with what of them has a loss.

    Args:
        vocab_size: all tokens are below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._lists, self._losses = TokenLists(vocab_size), array("q")
        self._trained, self._ends = Storage(), array("q", [0])  # a bit for each token, each text in bytes of its own

    def __len__(self) -> int:
        return len(self._lists)

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

    def finished(self) -> Sequence[Text]:
        """The texts: a list if they are few, else this."""
        return list(self) if self._lists.is_in_memory else self

    def _item(self, at: int) -> Text:
        bits = np.frombuffer(self._trained.read(self._ends[at], self._ends[at + 1]), np.uint8)
        return Text(self._lists[at], np.unpackbits(bits, count=self._lists.length(at)).astype(bool).tolist())


def lengths_of(pairs: Sequence[TokenPair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n] int64 each: tokens of the prompts, of the chosen and of the rejected answers."""
    if isinstance(pairs, TokenPairs):
        return pairs.lengths()
    prompt, chosen, reject = np.array([[len(tokens) for tokens in pair[:3]] for pair in pairs]).T
    return prompt, chosen, reject
