"""Pairs with their references, of which only numbers are in memory: tokens that are too many for it are in a file."""

from array import array

import numpy as np
from numpy.typing import ArrayLike

from src.data.packing import Sizes
from src.data.spill import Stored
from src.data.token_lists import EMPTY, TokenPairs
from src.preference.entries import Numbered, Pair


class Pairs(Stored[Pair]):
    """Pairs of lists of tokens that several pairs may share.

    Args:
        tokens: the n pairs without their references.
        references: [n, 3], nats: of their chosen answers, rejects and mismatched answers, 0 for none.
        kl, kl_from: [n] each, the number of the mismatched answer among the lists, EMPTY for none, and where its loss begins.
    """

    def __init__(self, tokens: TokenPairs, references: ArrayLike = (), kl: ArrayLike = (), kl_from: ArrayLike = ()) -> None:
        self.lists, self.tokens = tokens.lists, tokens
        self._references = array("d", np.asarray(references, np.float64).tobytes())
        self._kl, self._kl_from = (array("i", np.asarray(column, np.int32).tobytes()) for column in (kl, kl_from))

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, pair: Numbered) -> None:
        self.tokens.append(pair.prompt, pair.chosen, pair.reject, pair.chosen_from, pair.reject_from)
        self._references.extend((pair.chosen_base_prob, pair.reject_base_prob, pair.kl_base_prob))
        self._kl.append(pair.kl)
        self._kl_from.append(pair.kl_from)

    def numbered(self, at: int) -> Numbered:
        prompt, chosen, reject, chosen_from, reject_from = self.tokens.numbers(at)
        of_chosen, of_reject, of_kl = self._references[3 * at:3 * at + 3]
        return Numbered(prompt, chosen, reject, of_chosen, of_reject, chosen_from, reject_from, self._kl[at], of_kl,
                        self._kl_from[at])

    def references(self) -> np.ndarray:
        """[n, 3] float64"""
        return np.array(self._references).reshape(-1, 3)

    def has_kl(self) -> np.ndarray:
        """[n] bool: whether a pair has a mismatched answer."""
        return np.array(self._kl) != EMPTY

    def mismatched(self) -> TokenPairs:
        """Each prompt with its mismatched answer as a chosen one, which is empty where there is none."""
        none = np.full(len(self), EMPTY)
        return TokenPairs(self.lists, self.tokens.columns()[0], np.array(self._kl), none, np.array(self._kl_from), none)

    def sizes(self) -> Sizes:
        """See `sizes_of`."""
        return self.tokens.sizes()

    def selected(self, which: np.ndarray) -> "Pairs":
        """Those where `which`, [n] bool, is True."""
        if which.all():
            return self
        return Pairs(TokenPairs(self.lists, *(column[which] for column in self.tokens.columns())), self.references()[which],
                     np.array(self._kl)[which], np.array(self._kl_from)[which])

    def _item(self, at: int) -> Pair:
        pair = self.numbered(at)
        kl = self.lists[pair.kl] if pair.kl else ()
        return Pair(self.lists[pair.prompt], self.lists[pair.chosen], self.lists[pair.reject], *pair[3:7], kl, *pair[8:])
