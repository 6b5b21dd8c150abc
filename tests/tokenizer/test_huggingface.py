"""Tokenizer files made and read by the `tokenizers` library itself."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from src.errors import UserError
from src.tokenizer.huggingface import HuggingFaceTokenizer

TEXT = "the cat sat on the mat; the cat, 你好 👍"


@pytest.fixture(params=[["<|endoftext|>"], ["<pad>", "<|endoftext|>"], ["<pad>"], []], ids=str)
def special(request):
    return request.param


@pytest.fixture
def library(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[-1]} $A", special_tokens=[(special[-1], tokenizer.token_to_id(special[-1]))])
    return tokenizer


@pytest.fixture
def ours(library, tmp_path):
    library.save(str(tmp_path / "tokenizer.json"))
    return HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("text", ["", "the cat", TEXT, "brand new wörds\n\n\n"])
def test_ids_are_the_library_s_without_added_tokens_and_text_comes_back(ours, library, special, text):
    tokens = ours.encode(text)
    assert tokens == library.encode(text).ids[1 if special else 0:]
    assert ours.decode(tokens) == text
    assert ours.decode_bytes(tokens) == text.encode()


def test_sizes_and_end_of_text_come_from_the_file(ours, library, special):
    assert ours.vocab_size == library.get_vocab_size()
    assert ours.end_of_text == (special.index("<|endoftext|>") if "<|endoftext|>" in special else 0)


def test_end_of_text_shows_nothing_but_an_ordinary_token_0_does(ours, special):
    tokens = [*ours.encode("the"), ours.end_of_text]
    shown = ours.decode(tokens)
    assert shown == "the" if "<|endoftext|>" in special else shown.startswith("the") and len(shown) > 3


def test_part_of_a_character_becomes_the_replacement_character(ours):
    tokens = ours.encode("𓀀")
    assert len(tokens) > 1 and "\ufffd" in ours.decode(tokens[:1])


def test_a_lone_surrogate_counts_as_a_question_mark(ours):
    assert ours.encode("a\ud800") == ours.encode("a?")


def test_an_id_beyond_the_vocabulary_is_an_error(ours):
    for token in (-1, ours.vocab_size):
        with pytest.raises(UserError, match=f"token id {token} is beyond"):
            ours.decode([token])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 5}', b"\xff\xfe", b"{}"])
def test_a_broken_file_is_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a Hugging Face tokenizer") as caught:
        HuggingFaceTokenizer(str(path))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        HuggingFaceTokenizer(str(tmp_path / "no.json"))
