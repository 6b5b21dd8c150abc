"""Tokenizer files made and read by the `tokenizers` library itself."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from src.data.conversation import clean
from src.errors import UserError
from src.tokenizer.huggingface import HuggingFaceTokenizer
from tests.tokenizer.files import ASCII, KINDS, LOSSLESS, SPACE, saved

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


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def both(kind, tmp_path):
    """Ours, and the library's own reading of the same file."""
    path = saved(KINDS[kind](), tmp_path)
    return HuggingFaceTokenizer(path), Tokenizer.from_file(path)


def whole_ids(library: Tokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


# White space as it can stand in a text that has been cleaned, letters that some of the vocabularies lack, and no control words.
LETTERS = st.text(alphabet=" \nabcdehstuUA:;,.!?'0123456789-é你👍", max_size=30)


@settings(max_examples=60)
@given(prompt=LETTERS, answer=LETTERS)
def test_a_continuing_text_s_tokens_end_the_whole_text_s(both, prompt, answer):
    """A colon before and a space behind, as in every template: no token of these vocabularies reaches across."""
    ours, library = both
    prompt, answer = f"User: {clean(prompt)}\n\nAssistant:", f" {clean(answer)}\n\n"
    assert ours.encode(prompt) == whole_ids(library, prompt)
    assert ours.encode(prompt) + ours.encode(answer, continues=True) == whole_ids(library, prompt + answer)


@settings(max_examples=150)
@given(first=st.text(alphabet="abcthesU :.\n", min_size=1, max_size=12), second=st.text(alphabet="abcthesU :.\n", max_size=12))
@pytest.mark.parametrize("kind", ["ByteLevel", "ByteLevel with a prefix", "Prepend", "Metaspace first", "Metaspace always"],
                         indirect=True)
def test_so_they_do_at_any_border_that_no_token_reaches_across(both, first, second):
    """Where one does, the text is the whole one all the same, in other tokens."""
    ours, library = both
    if first.startswith(" "):
        first = f"x{first}"  # a first space is the one that is put there else
    tokens = ours.encode(first) + ours.encode(second, continues=True)
    assert library.decode(tokens, skip_special_tokens=False) == library.decode(whole_ids(library, first + second))
    offsets = library.encode(first + second, add_special_tokens=False).offsets
    across = any(start < len(first) < end for start, end in offsets)
    # White space at the border GPT-2 splits by what stands behind it.
    if not across and not first[-1].isspace():
        assert tokens == whole_ids(library, first + second)


def test_where_a_token_reaches_across_the_border_the_answer_s_own_tokens_stand_behind_the_prompt_s(tmp_path):
    """As a runtime reads that prompt, which knows nothing of the answer to come; and both answers follow the same."""
    entries = {letter: number for number, letter in enumerate([SPACE, "a", "b", ":", f":{SPACE}", f"{SPACE}b"])}
    library = Tokenizer(models.BPE(entries, [(":", SPACE), (SPACE, "b")]))
    library.normalizer = normalizers.Replace(" ", SPACE)
    library.decoder = decoders.Replace(SPACE, " ")
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    assert [library.id_to_token(token) for token in whole_ids(library, "a: b")] == ["a", f":{SPACE}", "b"]
    tokens = ours.encode("a:") + ours.encode(" b", continues=True)
    assert [library.id_to_token(token) for token in tokens] == ["a", ":", f"{SPACE}b"]
    assert ours.decode_bytes(tokens) == b"a: b"


def test_an_old_spelling_of_metaspace_continues_without_a_space(tmp_path):
    library = KINDS["Metaspace always"]()
    described = json.loads(library.to_str())
    described["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "add_prefix_space": True, "str_rep": SPACE}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    ours = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    assert ours.encode("the cat") == whole_ids(library, "the cat")
    assert ours.encode("the:") + ours.encode("cat", continues=True) == whole_ids(library, "the:cat")


@pytest.mark.parametrize("normalizer", [
    normalizers.Strip(), normalizers.Replace(Regex(r"\A"), "a"), normalizers.Replace(Regex("^"), "a"),
    normalizers.Sequence([normalizers.Sequence([normalizers.Prepend("a")]), normalizers.Strip(right=False)])])
def test_whatever_a_normalizer_does_at_a_text_s_beginning_alone(normalizer, tmp_path):
    library = Tokenizer(models.BPE({letter: number for number, letter in enumerate(ASCII)}, []))
    library.normalizer, library.decoder = normalizer, decoders.Fuse()
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    assert ours.encode("b:") + ours.encode("  c d\nb", continues=True) == whole_ids(library, "b:  c d\nb")


@pytest.mark.parametrize("kind", ["Prepend", "Metaspace always", "Metaspace first", "ByteLevel with a prefix"])
@pytest.mark.parametrize("normalized", [False, True])
def test_behind_an_added_token_that_is_text_a_segment_begins_as_in_the_whole_text(kind, normalized, tmp_path):
    library = KINDS[kind]()
    library.add_tokens([AddedToken("<h1>", special=False, normalized=normalized)])
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    # Such a word the library looks for with the prepended space, and so finds it behind a space alone.
    unlike = kind == "Prepend" and normalized
    for answer in (" the<h1>cat", "<h1>cat", " the cat <h1> sat<h1>"):
        tokens, expected = ours.encode("the:") + ours.encode(answer, continues=True), whole_ids(library, "the:" + answer)
        assert tokens == expected or (unlike and " <h1>" in answer)
        assert ours.decode_bytes(tokens) == ours.decode_bytes(expected)


def test_truncation_and_padding_of_the_file_are_off(both, kind, tmp_path):
    ours, library = both
    library.enable_truncation(3)
    library.enable_padding(length=64)
    kept = HuggingFaceTokenizer(saved(library, tmp_path))
    for text in ("the", "the cat sat on the mat; the cat, and the cat"):
        for continues in (False, True):
            assert kept.encode(text, continues) == ours.encode(text, continues)
    assert len(kept.encode("the cat sat on the mat; the cat, and the cat")) > 3


def test_bpe_dropout_of_the_file_is_off(tmp_path):
    library = KINDS["ByteLevel"]()
    whole = whole_ids(library, "the cat sat on the mat")
    library.model.dropout = 0.9
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    assert all(ours.encode("the cat sat on the mat") == whole for _ in range(20))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("word", ["<|endoftext|>", "<|im_end|>", "</s>", "<｜User｜>", "<end_of_turn>", "<pad>"])
@pytest.mark.parametrize("kind", ["ByteLevel", "Prepend", "Unigram"])
def test_control_words_in_a_text_are_text(kind, word, special, tmp_path):
    library = KINDS[kind]()
    library.add_tokens([AddedToken(word, special=special, normalized=False)])
    token = library.token_to_id(word)
    assert token in whole_ids(library, f"the{word}cat")
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    for text in (word, f"the {word} cat", f"the{word}{word}cat\n\n"):
        for continues in (False, True):
            tokens = ours.encode(text, continues)
            assert token not in tokens
            if "｜" not in word or kind != "Unigram":  # which has no such letter
                assert ours.decode_bytes(tokens).decode().removeprefix("" if continues else " ") == text


def test_control_words_that_the_file_names_are_text_however_they_look(tmp_path):
    library = KINDS["ByteLevel"]()
    library.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("PADDING", "START", "END")])
    library.enable_padding(pad_token="PADDING", pad_id=library.token_to_id("PADDING"))
    library.post_processor = processors.RobertaProcessing(sep=("END", library.token_to_id("END")),
                                                          cls_token=("START", library.token_to_id("START")))
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    plain = KINDS["ByteLevel"]()
    assert ours.encode("the PADDING START END") == whole_ids(plain, "the PADDING START END")


@pytest.mark.parametrize("word", ["    ", "<h1>", "<think>", "[@name@]"])
def test_added_tokens_that_are_no_control_words_stay_tokens(word, tmp_path):
    """As GPT-NeoX's runs of spaces and Gemma's tags."""
    library = KINDS["ByteLevel"]()
    library.add_tokens([AddedToken(word, special=False, normalized=False)])
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    tokens = ours.encode(f"the{word}cat")
    assert library.token_to_id(word) in tokens and tokens == whole_ids(library, f"the{word}cat")
    assert ours.decode(tokens) == f"the{word}cat"


@pytest.mark.parametrize("kind", LOSSLESS, indirect=True)
@settings(max_examples=60)
@given(text=st.text(alphabet=" \nabcthe,.é你👍0", max_size=20), cut=st.integers(0, 60))
def test_pieces_join_to_the_text(both, text, cut):
    """A token that ends within a character gives the bytes that it has, and no token loses the space it begins with."""
    ours, library = both
    tokens = ours.encode(f"a{text}")
    joined = ours.decode_bytes(tokens[:cut]) + ours.decode_bytes(tokens[cut:])
    assert joined.decode().removeprefix(" ") == library.decode(tokens, skip_special_tokens=False).removeprefix(" ") == f"a{text}"
    assert b"".join(ours.decode_bytes([token]) for token in tokens) == joined


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"], indirect=True)
def test_pieces_join_to_what_the_library_decodes_in_the_midst_of_a_text(both):
    ours, library = both
    tokens = whole_ids(library, "the cats, user. the cat's 7th\n\n sat")
    whole = library.decode([*tokens, *tokens], skip_special_tokens=False)
    assert ours.decode_bytes(tokens * 2).decode().lstrip() == whole.lstrip()
    assert ours.decode_bytes(tokens).decode() == whole[-len(ours.decode_bytes(tokens)):]


def test_pieces_of_words_that_end_in_a_suffix(tmp_path):
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3, "a</w>": 4}, [("a", "b</w>")],
                                   end_of_word_suffix="</w>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    ours = HuggingFaceTokenizer(saved(library, tmp_path))
    tokens = ours.encode("ab aab b")
    assert ours.decode_bytes(tokens) == b"ab aab b " and library.decode(tokens) == "ab aab b"


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace first", "Unigram"])
def test_a_file_without_a_decoder_puts_no_space_between_tokens(kind, tmp_path):
    library = KINDS[kind]()
    described = json.loads(library.to_str()) | {"decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    ours = HuggingFaceTokenizer(str(tmp_path / "tokenizer.json"))
    tokens = ours.encode("the cats sat")
    assert ours.decode(tokens) == "the cats sat" and ours.decode_bytes(tokens).decode().strip() == "the cats sat"
