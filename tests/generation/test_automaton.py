"""The automaton of endings against looking at the whole text after each token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.generation.automaton import ENDS, NEVER, STOPS, build_automaton
from src.generation.vocabulary import answer_text, read_vocabulary
from src.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
END_OF_TEXT, BANNED = 0, 1
# Bytes of blanks of one to three bytes, of characters that begin like them, and of ones whose second byte has a narrow range.
ALPHABET = b" \n\rabEN\xc2\xa0\xc3\xa9\xe3\x80\x81\xe2\xe1\x9a\xe0\xf0\x9f\xed\xf4\x90"
STOPS_TRIED = ["\n\n", "", "END", "abab", "aab", " \n ", "é", "aéa", "\N{NO-BREAK SPACE}", "a" * 9]


def follow(automaton, pieces: list[bytes], stop: str, tokens: list[int]) -> None:
    """Walk along `tokens` as far as the automaton lets; at every step it must say of all tokens what the text does."""
    state, text = 0, b""
    for token in tokens:
        assert (state < automaton.n_blank) == (answer_text(BYTES, list(text), stop) == "")
        for other, piece in enumerate(pieces):
            after, whole = int(automaton.next[state, other]), text + piece
            if other == BANNED:
                expected = after == NEVER
            elif other == END_OF_TEXT:
                expected = after == (ENDS if answer_text(BYTES, list(text), stop) else NEVER)
            elif stop and stop.encode() in whole:
                expected = after == (STOPS if answer_text(BYTES, list(whole), stop) else NEVER)
            else:
                expected = after >= 0
            assert expected, (text, piece, after)
        if automaton.next[state, token] >= 0:
            state, text = int(automaton.next[state, token]), text + pieces[token]


@given(st.data(), st.sampled_from(STOPS_TRIED), st.lists(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=5), max_size=6))
def test_it_says_what_the_text_says(data, stop, longer):
    pieces = [b"<end>", b"\n", *(bytes([byte]) for byte in ALPHABET), *map(bytes, longer), stop.encode(), stop.encode()[:2]]
    banned = torch.tensor([False, True] + [False] * (len(pieces) - 2))
    automaton = build_automaton(pieces, banned, END_OF_TEXT, stop.encode())
    follow(automaton, pieces, stop, data.draw(st.lists(st.sampled_from(range(2, len(pieces))), max_size=12)))


@pytest.mark.parametrize(("stop", "texts"), [("\n\n", [b"", b"x", b"\n", b"x\n"]), ("\n\nUser:", [b"\n\nUse", b" x\n\nUse"]),
                                             ("", [b"", b"x"])])
def test_the_world_vocabulary(stop, texts):
    """All 65536 tokens after a few texts, against the bytes."""
    vocabulary = read_vocabulary(load_tokenizer("world"), 65536, ban_end_of_text=True)
    automaton = build_automaton(vocabulary.pieces, vocabulary.banned, 0, stop.encode())
    assert (automaton.next == NEVER).all(0).equal(vocabulary.banned)
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    for text in texts:
        state = 0
        for byte in text:
            state = int(automaton.next[state, ids[bytes([byte])]])
        allowed = ~vocabulary.banned
        ends = torch.tensor([bool(stop) and stop.encode() in text + piece for piece in vocabulary.pieces]) & allowed
        blank = torch.tensor([not answer_text(BYTES, text + piece, stop) for piece in vocabulary.pieces])
        assert (automaton.next[state] == STOPS).equal(ends & ~blank) and (automaton.next[state] >= 0).equal(~ends & allowed)
