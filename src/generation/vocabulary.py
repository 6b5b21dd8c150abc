"""What generation needs from a tokenizer: each token's bytes, which tokens are never drawn, and an answer's text."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.templates import Ending
from src.tokenizer import Tokenizer

# Tokens of only these characters repeat in any table or sum; the rwkv package does not count them either.
UNCOUNTED = b" \t0123456789"
_PADDING = (b"", "\N{REPLACEMENT CHARACTER}".encode())


class Vocabulary(NamedTuple):
    """The V rows of a model's head as text."""

    pieces: list[bytes]  # the bytes that each token adds to an answer
    banned: Tensor  # [V] bool, never drawn
    weight: Tensor  # [V] float32, 1 where a drawn token counts for the frequency penalty, else 0


def read_vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> Vocabulary:
    """The vocabulary of a model with `vocab_size` rows.

    Banned are the end of text, unless it is among the tokens that end an answer (`ends`), tokens that add nothing to a text, and
    the padding rows of a checkpoint after the tokenizer's last entry, which no training has seen.
    """
    known = min(vocab_size, tokenizer.vocab_size)
    pieces = [tokenizer.decode_bytes([token]) for token in range(known)]
    while known and pieces[known - 1] in _PADDING:
        known -= 1
    pieces += [b""] * (vocab_size - len(pieces))
    banned = torch.tensor([token >= known or not piece for token, piece in enumerate(pieces)])
    banned[tokenizer.end_of_text] = True
    banned[list(ends)] = False
    weight = torch.tensor([float(piece not in UNCOUNTED) for piece in pieces])
    return Vocabulary(pieces, banned, weight)


def end_tokens(tokenizer: Tokenizer, ending: Ending) -> list[int]:
    """The tokens that end an answer."""
    return [tokenizer.control[word] for word in ending.controls]


def answer_text(tokenizer: Tokenizer, tokens: Sequence[int], ending: Ending) -> str:
    """The text of a whole answer: up to what ends it, without an incomplete character at the end."""
    if tokens and tokens[-1] in end_tokens(tokenizer, ending):
        tokens = tokens[:-1]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text = decoder.decode(tokenizer.decode_bytes(tokens))
    found = [(at + len(stop), at) for stop in ending.stops if (at := text.find(stop)) >= 0]
    return ending.answer(text[:min(found)[1]] if found else text)
