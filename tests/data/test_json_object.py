"""An object that is read member by member is that of the whole text, wherever the pieces end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import json_window, spill
from src.data.json_object import Members, read_object
from src.data.spill import Spill
from tests.data.test_json_values import texts, trees


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "a.json"


def read(file, text: str, piece: int):
    """What `read_object` gives, with lists and dicts for what is not in memory."""
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_window, "_PIECE", piece)
        patch.setattr(spill, "IN_MEMORY", 0)
        return plain(read_object(file))


def plain(value):
    if isinstance(value, Members):
        return dict(zip(value.names, map(plain, value.values), strict=True))
    return list(map(plain, value)) if isinstance(value, Spill) else value


@given(st.dictionaries(texts, trees, max_size=5), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans(),
       st.sampled_from(["", ",", " \n,\n", "\x0c", "\xa0\n", ",\x0b"]))
def test_an_object_is_that_of_the_whole(file, value, piece, indent, is_ascii, end):
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii).encode(errors="replace").decode()
    assert read(file, text + end, piece) == json.loads(text)


@pytest.mark.parametrize("text", [
    "", "[1]", "null", '{"a": 1} {"b": 2}', '{"a": 1},\n{"b": 2}', '{"a": 1}\x0c{"b": 2}', '{"a": [1, 2]}]',
    '{"a": "\udc80"}{"a": 1}',
])
@pytest.mark.parametrize("piece", [1, 100])
def test_other_texts_are_none(file, text, piece):
    assert read(file, text, piece) is None


def test_only_what_is_long_is_kept_in_files(file, monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", 160_000)
    long = {"list": ["ab"] * 200_000, "object": {str(number): number for number in range(100_000)}}
    file.write_text(json.dumps(long | {"short": ["ab"] * 100, "text": "a" * 1_000_000}))
    whole = read_object(file)
    assert [type(value) for value in whole.values] == [Spill, Members, list, str]
    assert all(isinstance(part, Spill) for part in whole.values[1])
    assert plain(whole.values[0]) == long["list"] and plain(whole.values[1]) == long["object"]
