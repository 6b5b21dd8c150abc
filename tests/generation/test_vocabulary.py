"""Which tokens are never drawn, which are not counted, and where an answer's text ends."""

import pytest
import torch

from src.generation.vocabulary import answer_text, read_vocabulary
from src.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def test_world_bans_the_end_of_text_and_the_padding_alone():
    world = load_tokenizer("world")
    vocabulary = read_vocabulary(world, 65536, ban_end_of_text=True)
    assert vocabulary.banned.nonzero().flatten().tolist() == [0, *range(65530, 65536)]
    assert b"".join(vocabulary.pieces[token] for token in world.encode("né 12\n")) == "né 12\n".encode()
    # The rwkv package's rule, on the text of each token.
    uncounted = [token for token in range(65530) if world.decode([token]) in " \t0123456789"]
    assert (vocabulary.weight[:65530] == 0).nonzero().flatten().tolist() == uncounted
    # Its smaller checkpoints have fewer rows than the tokenizer has ids.
    assert read_vocabulary(world, 65529, ban_end_of_text=True).banned.nonzero().flatten().tolist() == [0]


def test_bytes_bans_the_end_of_text_and_rows_that_no_byte_has():
    assert read_vocabulary(BYTES, 260, ban_end_of_text=True).banned.nonzero().flatten().tolist() == [0, 256, 257, 258, 259]
    assert not read_vocabulary(BYTES, 256, ban_end_of_text=False).banned.any()
    assert read_vocabulary(BYTES, 256, ban_end_of_text=True).weight.dtype == torch.float32


@pytest.mark.parametrize(("data", "text"), [
    (b" Paris.\n\nUser: more", "Paris."), (b"a\r\nb \n \nc\n\n", "a\nb \nc"), (b"\n\nx", ""), (b"  \t\n", ""),
    ("caf\u00e9".encode()[:-1], "caf"), (b"caf\xc3 x", "caf\ufffd x"), (b"\xf0\x9f\x98", ""),
])
def test_answer_text(data, text):
    assert answer_text(BYTES, list(data), "\n\n") == text


def test_answer_text_without_a_stop():
    assert answer_text(BYTES, list(b" a\n\nb "), "") == "a\nb"
