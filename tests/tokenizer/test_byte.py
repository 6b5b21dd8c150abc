"""The byte tokenizer against Python's own UTF-8."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UserError
from src.tokenizer.byte import ByteTokenizer

tokenizer = ByteTokenizer()


@given(text=st.text())
def test_a_token_is_the_byte_s_value(text):
    assert bytes(tokenizer.encode(text)) == text.encode("utf-8")


@given(text=st.text().filter(lambda text: "\x00" not in text))
def test_text_comes_back(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(data=st.binary())
def test_broken_utf8_becomes_the_replacement_character(data):
    kept = data.replace(b"\x00", b"")
    assert tokenizer.decode_bytes(list(data)) == kept
    assert tokenizer.decode(list(data)) == kept.decode("utf-8", errors="replace")


def test_zero_ends_the_text_and_shows_nothing():
    assert tokenizer.end_of_text == 0 and tokenizer.vocab_size == 256
    assert tokenizer.encode("a\x00") == [97, 0]
    assert tokenizer.decode([97, 0]) == "a"


def test_empty_and_lone_surrogate():
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.encode("\udfff") == [ord("?")]


@pytest.mark.parametrize("token", [-1, 256])
def test_an_id_beyond_the_vocabulary_is_an_error(token):
    with pytest.raises(UserError, match=f"token id {token} is beyond"):
        tokenizer.decode([97, token])
