"""Which tokens are never drawn, which are not counted, and where an answer's text ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from src.data.conversation import clean
from src.data.templates import CLASSIC, Ending
from src.generation.automaton import STOPS, build_automaton
from src.generation.vocabulary import answer_text, read_vocabulary
from src.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.tokenizer.files import KINDS, LOSSLESS, SPACE, saved

BYTES = load_tokenizer("bytes")


def test_world_bans_the_end_of_text_and_the_padding_alone():
    world = load_tokenizer("world")
    vocabulary = read_vocabulary(world, 65536, ends=[])
    assert vocabulary.banned.nonzero().flatten().tolist() == [0, *range(65530, 65536)]
    assert b"".join(vocabulary.pieces[token] for token in world.encode("né 12\n")) == "né 12\n".encode()
    # The rwkv package's rule, on the text of each token.
    uncounted = [token for token in range(65530) if world.decode([token]) in " \t0123456789"]
    assert (vocabulary.weight[:65530] == 0).nonzero().flatten().tolist() == uncounted
    # Its smaller checkpoints have fewer rows than the tokenizer has ids.
    assert read_vocabulary(world, 65529, ends=[]).banned.nonzero().flatten().tolist() == [0]


def test_bytes_bans_the_end_of_text_and_rows_that_no_byte_has():
    assert read_vocabulary(BYTES, 260, ends=[]).banned.nonzero().flatten().tolist() == [0, 256, 257, 258, 259]
    assert not read_vocabulary(BYTES, 256, ends=[0]).banned.any()
    assert read_vocabulary(BYTES, 256, ends=[]).weight.dtype == torch.float32


@pytest.mark.parametrize(("data", "text"), [
    (b" Paris.\n\nUser: more", "Paris."), (b"a\r\nb \n \nc\n\n", "a\nb \nc"), (b"\n\nx", ""), (b"  \t\n", ""),
    ("caf\u00e9".encode()[:-1], "caf"), (b"caf\xc3 x", "caf\ufffd x"), (b"\xf0\x9f\x98", ""),
])
def test_answer_text(data, text):
    assert answer_text(BYTES, list(data), CLASSIC.ending) == text


def test_answer_text_without_a_stop():
    assert answer_text(BYTES, list(b" a\n\nb "), Ending((), (), collapses=True)) == "a\nb"


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=60)
@given(answer=st.text(alphabet=" abcthes.\né", max_size=20))
def test_an_answer_s_text_and_the_pieces_it_is_followed_by_are_what_the_library_decodes(kind, answer, tmp_path):
    """Though its decoder takes off the space before the first token, each of these tokens may be one that begins with a space."""
    tokenizer = HuggingFaceTokenizer(saved(KINDS[kind](), tmp_path))
    library = Tokenizer.from_file(tokenizer.name)
    tokens = tokenizer.encode(f" {answer}", continues=True)
    endless = Ending((), (), collapses=True)
    assert answer_text(tokenizer, tokens, endless) == clean(library.decode(tokens, skip_special_tokens=False))
    pieces = read_vocabulary(tokenizer, tokenizer.vocab_size, []).pieces
    whole = b"".join(pieces[token] for token in tokens).decode()
    assert whole == f" {answer}"
    for stop in ("\n\n", "the cat", " c", "é"):
        assert answer_text(tokenizer, tokens, Ending((stop,), (), collapses=True)) == clean(whole.partition(stop)[0])


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace first", "Unigram"])
def test_a_token_that_is_a_space_may_be_drawn(kind, tmp_path):
    tokenizer = HuggingFaceTokenizer(saved(KINDS[kind](), tmp_path))
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size, ends=[tokenizer.end_of_text])
    space = Tokenizer.from_file(tokenizer.name).token_to_id(SPACE)
    assert vocabulary.pieces[space] == b" " and not vocabulary.banned[space] and vocabulary.weight[space] == 0


def test_tokens_that_end_within_a_character_are_no_padding(tmp_path):
    tokenizer = HuggingFaceTokenizer(saved(KINDS["Prepend"](), tmp_path))
    last = Tokenizer.from_file(tokenizer.name).token_to_id("<0xFF>")
    assert last == tokenizer.vocab_size - 1
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size + 3, ends=[tokenizer.end_of_text])
    assert vocabulary.pieces[last] == b"\xff" and vocabulary.banned.nonzero().flatten().tolist() == [last + n for n in (1, 2, 3)]


def test_a_stop_is_found_across_tokens_that_begin_with_a_space(tmp_path):
    """The first token that completes it ends the answer, and not a later one."""
    tokenizer = HuggingFaceTokenizer(saved(KINDS["Metaspace first"](), tmp_path))
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size, ends=[tokenizer.end_of_text])
    automaton = build_automaton(vocabulary.pieces, vocabulary.banned, [tokenizer.end_of_text], [b"the cat"])
    state, taken = 0, []
    for token in tokenizer.encode(" on the cat sat", continues=True):
        taken.append(token)
        state = int(automaton.next[state, token])
        if state == STOPS:
            break
    assert tokenizer.decode_bytes(taken) == b" on the cat" and answer_text(tokenizer, taken, Ending(("the cat",), ())) == "on"
