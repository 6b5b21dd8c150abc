"""Which tokenizer a name, or a checkpoint's vocabulary, chooses."""

import pytest
from tokenizers import Tokenizer, models

from src.errors import UserError
from src.tokenizer import load_tokenizer


@pytest.mark.parametrize("name, vocab_size, expected", [
    (None, 65536, "world"), (None, 65529, "world"), (None, 65530, "world"), (None, 256, "bytes"),
    ("world", None, "world"), ("world", 65536, "world"), ("bytes", None, "bytes"),
    ("bytes", 256, "bytes"), ("bytes", 65536, "bytes"),
])
def test_the_choice(name, vocab_size, expected):
    tokenizer = load_tokenizer(name, vocab_size)
    assert tokenizer.name == expected
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


@pytest.mark.parametrize("vocab_size", [None, 0, 255, 257, 50277, 65528, 65537])
def test_a_vocabulary_that_tells_nothing_asks_for_the_flag(vocab_size):
    with pytest.raises(UserError, match="give --tokenizer"):
        load_tokenizer(None, vocab_size)


def test_an_unknown_name_lists_the_choices():
    with pytest.raises(UserError, match="--tokenizer wrold: expected world, bytes"):
        load_tokenizer("wrold")


@pytest.mark.parametrize("name, vocab_size", [("world", 256), ("world", 50277), ("bytes", 255)])
def test_more_ids_than_the_checkpoint_has_rows_is_an_error(name, vocab_size):
    with pytest.raises(UserError, match=f"vocabulary only {vocab_size}"):
        load_tokenizer(name, vocab_size)


def test_a_file_by_its_ending(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "yes": 1, "no": 7}, unk_token="no")).save(path)
    tokenizer = load_tokenizer(path, 8)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.encode("yes")) == (path, 8, [1])
    with pytest.raises(UserError, match="has 8 ids, the checkpoint's vocabulary only 7"):
        load_tokenizer(path, 7)
