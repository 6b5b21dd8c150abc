"""Pairs as the project stores them, from plain ones."""

from collections.abc import Sequence

from src.data.token_lists import SharedLists, TokenPair, TokenPairs
from src.preference.entries import Numbered, Pair
from src.preference.stored import Pairs

VOCAB = 65536


def stored(pairs: Sequence[Pair], vocab_size: int = VOCAB) -> Pairs:
    """A list of tokens that is in several pairs as one object is stored once."""
    lists, numbers = SharedLists(vocab_size), {}

    def number(tokens: Sequence[int]) -> int:
        if id(tokens) not in numbers:
            numbers[id(tokens)] = lists.append(tokens)
        return numbers[id(tokens)]

    made = Pairs(TokenPairs(lists))
    for pair in pairs:
        made.append(Numbered(*map(number, pair[:3]), *pair[3:7], number(pair.kl), *pair[8:]))
    return made


def stored_tokens(pairs: Sequence[TokenPair], vocab_size: int = VOCAB) -> TokenPairs:
    made = TokenPairs(SharedLists(vocab_size))
    for pair in pairs:
        made.append(*map(made.lists.append, pair[:3]), *pair[3:])
    return made
