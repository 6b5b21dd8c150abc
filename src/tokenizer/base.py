"""What every tokenizer offers, and the one check they share."""

from collections.abc import Sequence
from typing import Protocol

from src.errors import UserError


class Tokenizer(Protocol):
    """Text to token ids and back; knows nothing of templates or models."""

    name: str
    vocab_size: int  # ids are in 0 .. vocab_size - 1
    end_of_text: int
    lossless: bool  # whether every text comes back from its tokens as it was written

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of `text`, whole and with control words read as text; empty text gives [].

        Lone surrogates, which no UTF-8 has, count as "?".

        Args:
            continues: whether the text goes on from another one, so that nothing is put before it. The tokens of the two are then
                those of both in one, unless a token reaches across the border.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD. Raises UserError for an id beyond the vocabulary."""

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Bytes of `tokens` within a text, those of a sequence end to end; a piece may end within a character.

        A space that `decode` takes off a text's beginning stays. Raises UserError as `decode` does.
        """


def require_known(tokens: Sequence[int], vocab_size: int, name: str) -> None:
    """Raise UserError unless every id is in 0 .. vocab_size - 1."""
    if len(tokens) > 0 and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise UserError(f"token id {bad} is beyond the vocabulary of the {name} tokenizer ({vocab_size} ids); "
                        "choose the --tokenizer these tokens were made with")
