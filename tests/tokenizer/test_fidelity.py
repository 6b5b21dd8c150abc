"""Which texts a tokenizer changes, by what is known of it: the letters in its vocabulary, and what its normalizer throws away."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from src.tokenizer import load_tokenizer
from src.tokenizer.fidelity import Changes, Encoder
from src.tokenizer.huggingface import HuggingFaceTokenizer
from tests.tokenizer.files import ASCII, KINDS, LOSSLESS, saved


@pytest.fixture
def encoder(request, tmp_path):
    return Encoder(HuggingFaceTokenizer(saved(KINDS[request.param](), tmp_path)))


def one_line(changes: Changes, capsys) -> str:
    changes.report("my.csv", "t.json")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: my.csv: ")
    return err


@pytest.mark.parametrize("name", ["world", "bytes"])
def test_world_and_bytes_change_nothing(name, capsys):
    encoder = Encoder(load_tokenizer(name))
    for row, text in enumerate(("é你👍 <|endoftext|>", "  \n", "\ufffd", "\x01\x7f"), start=1):
        tokens = encoder.encode(text, row, "prompt")
        assert load_tokenizer(name).decode(tokens) == text
    encoder.changes().report("my.csv", name)
    assert encoder.changes().texts == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("encoder", LOSSLESS, indirect=True)
def test_nothing_is_said_where_every_byte_has_a_token(encoder, capsys):
    for row, text in enumerate(("the cat", "é你👍 <|endoftext|></s>", " two  spaces\n\n", "\ttab \x01", "", "U+FFFD \ufffd")):
        for part, continues in (("prompt", False), ("chosen", True)):
            encoder.encode(text, row, part, continues)
    encoder.changes().report("my.csv", "t.json")
    assert encoder.changes().texts == 0 and encoder.changes().looked_at == 12 and capsys.readouterr().err == ""


@pytest.mark.parametrize("encoder", ["Prepend without bytes", "Unigram"], indirect=True)
def test_letters_that_the_vocabulary_lacks_are_named_with_their_rows(encoder, capsys):
    texts = ["the cat", "你 cat 好", "the 你", "the mat"]
    for row, text in enumerate(texts, start=1):
        for part, continues in (("prompt", False), ("chosen", True)):
            encoder.encode(text, row, part, continues)
            encoder.encode(f"Question: {text}", row, part, continues)  # another form of the same
    changes = encoder.changes()
    assert (changes.looked_at, changes.texts, changes.rows, changes.lost) == (8, 4, (2, 3), "你好")
    assert "4 of 8 texts" in (err := one_line(changes, capsys))
    assert "row 2's chosen, which loses '你', '好'; lost in all: '你', '好'; choose a --tokenizer" in err


def test_letters_dropped_without_an_unknown_token(tmp_path, capsys):
    library = Tokenizer(models.BPE({letter: number for number, letter in enumerate(ASCII)}, []))
    encoder = Encoder(HuggingFaceTokenizer(saved(library, tmp_path)))
    assert encoder.encode("né", 7, "prompt") == encoder.encode("n", 8, "prompt")
    assert "1 of 2 texts" in (err := one_line(encoder.changes(), capsys)) and "row 7's prompt, which loses 'é'" in err


def test_only_part_of_a_letter_s_bytes(tmp_path):
    entries = {name: number for number, name in enumerate(["a", "<0xC3>"])}
    library = Tokenizer(models.BPE(entries, [], byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    encoder = Encoder(HuggingFaceTokenizer(saved(library, tmp_path)))
    encoder.encode("aé", 1, "prompt")
    assert encoder.changes().lost == "é"


@pytest.mark.parametrize(("normalizer", "text", "example"), [
    (normalizers.Lowercase(), "The Cat", "loses 'T', 'C'"), (normalizers.NFC(), "e\u0301", "loses 'e', '\u0301'"),
    (normalizers.StripAccents(), "a\u0301", "loses '\u0301'"), (normalizers.Strip(), "cat \n", "loses ' ', '\\n'"),
    (normalizers.Replace("a", "b"), "cat", "loses 'a'"),
    (normalizers.Replace("cat", "tac"), "a cat", "where 'a cat' becomes 'a tac'"),
    (normalizers.Replace("t", "tt"), "cat", "where 'cat' becomes 'catt'")])
def test_what_a_normalizer_changes(normalizer, text, example, tmp_path, capsys):
    library = KINDS["ByteLevel"]()
    library.normalizer = normalizer
    encoder = Encoder(HuggingFaceTokenizer(saved(library, tmp_path)))
    encoder.encode(text, 3, "reject", continues=True)
    assert example in one_line(encoder.changes(), capsys)


@pytest.mark.parametrize("encoder", ["WordPiece"], indirect=True)
def test_white_space_thrown_away(encoder, capsys):
    encoder.encode("the   cat\n\n", 1, "chosen", continues=True)
    assert "loses ' ', '\\n'" in one_line(encoder.changes(), capsys)


@pytest.mark.parametrize("encoder", ["Unigram"], indirect=True)
def test_a_line_stays_short_whatever_is_lost(encoder, capsys):
    lost = "".join(chr(0x4e00 + number) for number in range(500))
    for row in range(1, 100):
        encoder.encode(lost, row, "prompt")
    assert encoder.changes().rows == tuple(range(1, 21)) and encoder.changes().lost == lost
    assert len(one_line(encoder.changes(), capsys)) < 500
