"""The interface of every tokenizer, and the check they share."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from src.errors import UserError

# The control word that every tokenizer knows: the token that ends a text.
END_OF_TEXT = "<|endoftext|>"
# Its name in Hugging Face's conversions of RWKV models.
END_OF_TEXT_IN_RWKV = "<|rwkv_tokenizer_end_of_text|>"


class Tokenizer(Protocol):
    """Text to token ids and back; knows nothing about templates or models."""

    name: str
    vocab_size: int  # ids are in 0 .. vocab_size - 1
    end_of_text: int
    control: Mapping[str, int]  # tokens of control words; texts never contain these tokens
    lossless: bool  # whether every text comes back unchanged from its tokens

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of the whole `text`, with control words read as text; empty text gives [].

        Lone surrogates, which can't occur in UTF-8, are read as "?".

        Args:
            continues: whether the text continues another one, so that nothing is prepended. The tokens of the two are then those
                of the joined text, unless a token crosses the border.
        """

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; bytes that are not UTF-8 become U+FFFD. Raises UserError for an id beyond the vocabulary."""

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """The concatenated bytes of `tokens` within a text; they may end within a character.

        Keeps a space that `decode` strips from a text's beginning. Raises UserError like `decode`.
        """


def require_known(tokens: Sequence[int], vocab_size: int, name: str) -> None:
    """Raise UserError unless every id is in 0 .. vocab_size - 1."""
    if len(tokens) > 0 and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise UserError(f"token id {bad} is beyond the vocabulary of the {name} tokenizer ({vocab_size} ids); "
                        "choose the --tokenizer that these tokens were made with")
