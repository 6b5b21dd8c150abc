"""The automaton of endings against looking at the whole text after each token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.data.templates import Ending
from src.generation.automaton import ENDS, NEVER, STOPS, build_automaton
from src.generation.vocabulary import answer_text, read_vocabulary
from src.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")
END_OF_TEXT, BANNED = 0, 1
# Bytes of blanks of one to three bytes, of characters that begin like them, and of ones whose second byte has a narrow range.
ALPHABET = b" \n\rabEN\xc2\xa0\xc3\xa9\xe3\x80\x81\xe2\xe1\x9a\xe0\xf0\x9f\xed\xf4\x90"
STOPS_TRIED = [("\n\n",), (), ("END",), ("abab",), ("aab",), (" \n ",), ("é",), ("aéa",), ("\N{NO-BREAK SPACE}",), ("a" * 9,),
               ("\n\n", "\n\nEND"), ("abab", "ba"), ("aba", "baa", "aab"), ("a\na", "\n"), ("END", "ND", "D"), ("éa", "aé", "b")]


def written(text: bytes, stops: tuple[str, ...]) -> str:
    return answer_text(BYTES, list(text), Ending(stops, (), collapses=True))


def follow(automaton, pieces: list[bytes], stops: tuple[str, ...], ends: list[int], tokens: list[int]) -> None:
    """Walk along `tokens` as far as the automaton lets; at every step it must say of all tokens what the text does."""
    state, text = 0, b""
    for token in tokens:
        assert (state < automaton.n_blank) == (written(text, stops) == "")
        for other, piece in enumerate(pieces):
            after = int(automaton.next[state, other])
            if other == BANNED:
                expected = after == NEVER
            elif other in ends:
                expected = after == (ENDS if written(text, stops) else NEVER)
            elif (whole := up_to_a_stop(text, piece, stops)) is not None:
                expected = after == (STOPS if written(whole, stops) else NEVER)
            else:
                expected = after >= 0
            assert expected, (text, piece, after)
        if automaton.next[state, token] >= 0:
            state, text = int(automaton.next[state, token]), text + pieces[token]


def up_to_a_stop(text: bytes, piece: bytes, stops: tuple[str, ...]) -> bytes | None:
    """The text with as much of the piece as completes a stop; None if none is complete."""
    beginnings = (text + piece[:length] for length in range(1, len(piece) + 1))
    return next((whole for whole in beginnings if any(stop.encode() in whole for stop in stops)), None)


@given(st.data(), st.sampled_from(STOPS_TRIED), st.lists(st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=5), max_size=6))
def test_it_says_what_the_text_says(data, stops, longer):
    pieces = [b"<end>", b"\n", *(bytes([byte]) for byte in ALPHABET), *map(bytes, longer), "".join(stops).encode(),
              *(stop.encode()[:2] for stop in stops), b"<im>"]
    ends = [END_OF_TEXT, len(pieces) - 1]
    banned = torch.tensor([token == BANNED for token in range(len(pieces))])
    automaton = build_automaton(pieces, banned, ends, [stop.encode() for stop in stops])
    follow(automaton, pieces, stops, ends, data.draw(st.lists(st.sampled_from(range(2, len(pieces) - 1)), max_size=12)))


@pytest.mark.parametrize(("stop", "texts"), [("\n\n", [b"", b"x", b"\n", b"x\n"]), ("\n\nUser:", [b"\n\nUse", b" x\n\nUse"]),
                                             ("", [b"", b"x"])])
def test_the_world_vocabulary(stop, texts):
    """All 65536 tokens after a few texts, against the bytes."""
    vocabulary = read_vocabulary(load_tokenizer("world"), 65536, ends=[])
    automaton = build_automaton(vocabulary.pieces, vocabulary.banned, [], [stop.encode()] if stop else [])
    assert (automaton.next == NEVER).all(0).equal(vocabulary.banned)
    ids = {piece: token for token, piece in enumerate(vocabulary.pieces)}
    for text in texts:
        state = 0
        for byte in text:
            state = int(automaton.next[state, ids[bytes([byte])]])
        allowed = ~vocabulary.banned
        ends = torch.tensor([bool(stop) and stop.encode() in text + piece for piece in vocabulary.pieces]) & allowed
        blank = torch.tensor([not written(text + piece, (stop,) if stop else ()) for piece in vocabulary.pieces])
        assert (automaton.next[state] == STOPS).equal(ends & ~blank) and (automaton.next[state] >= 0).equal(~ends & allowed)
