"""The World tokenizer against the `rwkv` package's own, which this project did not write."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.errors import UserError
from src.tokenizer import load_tokenizer
from src.tokenizer.world import VOCABULARY_FILE, WorldTokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"

TEXTS = [
    "User: What is the capital of France?\n\nAssistant: Paris.\n\n",
    "def f(x):\n    return x ** 2  # ====================\n\n\n\t\t\treturn\r\n",
    "我们的目标是让每个人都能使用强大的语言模型。\n\n今天天气很好!\n 日本語のテキストも、確認します。한국어도 됩니다.",
    "Мы хотим, чтобы каждый мог. Ελληνικά; עברית, العربية. हिन्दी में ไทย tiếng Việt žluťoučký kůň",
    "👍🏽👨‍👩‍👧‍👦🇫🇷 ❤️‍🔥 e\u0301 \u200b\ufeff\u2028 𝔘𝔫𝔦 𓀀 \U0010ffff",
    " " * 200 + "#" * 200 + "-" * 81 + "\n" * 30,
    "\x00\x01\x7f\x80\xff",
]
BROKEN = [b"\xff\xfe\xfd", b"\xe4\xbd", b"\xed\xa0\x80", "你好".encode()[:-1], "👍".encode()[1:],
          b"ok \xc3( \xa0\xa1 \xf0\x28\x8c\x28"]


@pytest.fixture(scope="module")
def package():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(Path(importlib.util.find_spec("rwkv").submodule_search_locations[0]) / VOCABULARY_FILE))


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_texts_agree_and_come_back(world, package, text):
    tokens = world.encode(text)
    assert tokens == package.encode(text)
    assert world.decode(tokens) == text


@pytest.mark.parametrize("data", BROKEN)
def test_broken_utf8_agrees_and_never_raises(world, package, data):
    tokens = world.encode_bytes(data)
    assert tokens == package.encodeBytes(data)
    assert world.decode_bytes(tokens) == data
    assert world.decode(tokens) == data.decode("utf-8", errors="replace")
    assert "\ufffd" in world.decode(tokens)


@given(text=st.text())
def test_any_text_agrees(world, package, text):
    assert world.encode(text) == package.encode(text)


@given(data=st.binary(max_size=200))
def test_any_bytes_agree_and_come_back(world, package, data):
    tokens = world.encode_bytes(data)
    assert tokens == package.encodeBytes(data)
    assert world.decode_bytes(tokens) == data


@given(seed=st.integers(0, 2**32))
def test_entries_and_beginnings_of_entries_in_a_row_agree(world, package, seed):
    # Random text seldom meets long entries; whole and cut entries side by side meet every branch of the search.
    draw = random.Random(seed)
    entries = draw.choices(list(package.token2idx), k=30)
    data = b"".join(entry[:draw.randint(1, len(entry))] if draw.random() < 0.5 else entry for entry in entries)
    assert world.encode_bytes(data) == package.encodeBytes(data)


def test_every_entry_has_the_package_s_id(world, package):
    for token, entry in package.idx2token.items():
        assert world.decode_bytes([token]) == entry
        assert world.encode_bytes(entry) == [token]


@pytest.mark.skipif(not DATA.exists(), reason="the shared corpora are not here")
def test_a_megabyte_of_real_text_agrees(world, package):
    for name in ("tinyshakespeare.txt", "hh_harmless_pairs.csv"):
        text = (DATA / name).read_text(encoding="utf-8")[:500_000]
        assert world.encode(text) == package.encode(text)


def test_empty_end_of_text_and_padding(world):
    assert world.encode("") == [] and world.decode([]) == "" and world.decode_bytes([]) == b""
    assert world.end_of_text == 0 and world.decode_bytes([0]) == b""
    assert world.decode([65530, 65535]) == "\ufffd\ufffd"


def test_entries_beyond_a_checkpoint_s_rows_are_made_of_shorter_ones(world):
    """The last id is 65529, of 128 spaces: a checkpoint of as many rows has none for it."""
    few = WorldTokenizer(65529)
    assert few.vocab_size == load_tokenizer("world", 65529).vocab_size == load_tokenizer(None, 65529).vocab_size == 65529
    assert world.encode(" " * 128) == [65529]
    for text in (" " * 128, "x" + " " * 130 + "y"):
        tokens = few.encode(text)
        assert max(tokens) < 65529 and few.decode(tokens) == world.decode(tokens) == text
    assert few.encode("An ordinary text, 中文 too.\n") == world.encode("An ordinary text, 中文 too.\n")


def test_a_character_split_over_tokens_is_whole_in_the_bytes(world):
    tokens = world.encode("𓀀")
    assert len(tokens) > 1
    assert b"".join(world.decode_bytes([token]) for token in tokens).decode() == "𓀀"


def test_a_lone_surrogate_counts_as_a_question_mark(world):
    assert world.encode("a\ud800b") == world.encode("a?b")


@pytest.mark.parametrize("token", [-1, 65536, 10**9])
def test_an_id_beyond_the_vocabulary_is_an_error(world, token):
    with pytest.raises(UserError, match=f"token id {token} is beyond"):
        world.decode([5, token, 6])


def test_loading_runs_none_of_the_package_s_code():
    code = ("import sys; from src.tokenizer import load_tokenizer; load_tokenizer('world');"
            "assert not {'rwkv', 'rwkv.model', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install rwkv"):
        WorldTokenizer()


@pytest.mark.parametrize("vocabulary, expected", [
    ("1 open('{marker}','w') 1\n", "malformed"),
    ("1 'a' 2\n", "entry 1 is not 2 bytes long"),
    ("1 'a' 1\n", "not every byte is an entry"),
    ("not a vocabulary\n", ""),
    ("1 5 1\n", ""),
    ("1 'a 1\n", ""),
    (None, "No such file"),
])
def test_a_damaged_vocabulary_is_an_error_and_is_never_run(monkeypatch, tmp_path, vocabulary, expected):
    marker = tmp_path / "marker"
    if vocabulary is not None:
        (tmp_path / VOCABULARY_FILE).write_text(vocabulary.format(marker=marker))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(UserError, match=f"{expected}.*install the rwkv package again"):
        WorldTokenizer()
    assert not marker.exists()
