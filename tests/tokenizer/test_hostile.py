"""Tokenizer files that make the library fail: by an error, by giving up, by filling memory or by taking for ever."""

import json
import time

import pytest

from src.errors import Stopped, UserError
from src.tokenizer.huggingface import HuggingFaceTokenizer
from tests import hostile
from tests.tokenizer.files import byte_level, saved


@pytest.mark.parametrize("name", hostile.tokenizer_files())
def test_a_file_that_the_library_fails_on_is_one_line(tmp_path, capfd, name):
    content, text = hostile.tokenizer_files()[name]
    path, started = tmp_path / "tokenizer.json", time.monotonic()
    path.write_text(content)
    capfd.readouterr()
    with pytest.raises(UserError) as caught:
        HuggingFaceTokenizer(str(path)).encode(text)
    assert str(caught.value).startswith(f"--tokenizer {path}: ") and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # the library's Rust has a report of its own
    assert time.monotonic() - started < 20


def test_what_decoding_fails_on_is_one_line(tmp_path, capfd):
    described = json.loads(byte_level().to_str()) | {"decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 5}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode("ab")
    capfd.readouterr()
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(UserError, match="tokenizer.json: can't decode"):
            decode(tokens)
    assert capfd.readouterr() == ("", "")


def test_ids_with_holes_and_long_words_are_read(tmp_path):
    described = json.loads(byte_level().to_str())
    described["model"]["vocab"]["long" * 250_000] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_size == 5001 and tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.decode_bytes([4000]) == b"" and tokenizer.decode_bytes([5000]) == b"long" * 250_000


@pytest.mark.parametrize("error", [Stopped(2), MemoryError()])
def test_a_signal_and_full_memory_are_no_fault_of_the_tokenizer_s(tmp_path, error):
    tokenizer = HuggingFaceTokenizer(saved(byte_level(), tmp_path))

    class Interrupted:
        def encode(self, *_, **__):
            raise error

    tokenizer._whole = Interrupted()
    with pytest.raises(type(error)):
        tokenizer.encode("ab")


def test_stderr_is_there_again_afterwards(tmp_path, capfd):
    import sys

    HuggingFaceTokenizer(saved(byte_level(), tmp_path)).encode("ab")
    print("here", file=sys.stderr)
    assert capfd.readouterr().err == "here\n"
