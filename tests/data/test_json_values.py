"""Values that are decoded piece by piece are those of the whole text, wherever the pieces end; so are the places of faults."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import json_values, json_window
from src.data.json_values import has_row_a_line, one_after_another, row_a_line
from src.errors import UserError

texts = st.text(max_size=6) | st.just("é\"\\\n😀\ud83d")
trees = st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | texts,
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "a.json"


def read(file, text: str, piece: int) -> list:
    file.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_window, "_PIECE", piece)
        return list(row_a_line(file) if has_row_a_line(file) else one_after_another(file))


@given(st.lists(trees, max_size=5), st.integers(1, 9), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_values_are_those_of_the_whole(file, items, piece, indent, is_list, is_ascii):
    items = items if is_list else [{"item": item} for item in items]

    def dumped(value) -> str:
        text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
        return text.encode(errors="replace").decode()  # half characters can be written only as escapes

    whole = dumped(items)
    assert read(file, whole if is_list else "\n".join(map(dumped, items)), piece) == json.loads(whole)


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
@pytest.mark.parametrize("text, said", [
    ('[\n{"a": 1},\n{"b": tru}]', "row 2 is not JSON (Expecting value at line 3, character 7)"),
    ('[{"a": 1},          {"b": "x]', "row 2 is not JSON (Unterminated string starting at character 27)"),
    ('[{"a": 1}\n\n{"b": 2}]', "row 1 is not JSON (a comma is expected after it in line 3)"),
    ('[{"a": 1},\n {"b": 2}', "the list does not end after row 2"),
    ('[{"a": 1}]\n\n,', "something follows the list of rows in line 3"),
    ('[{"a": "\\u12"}]', "row 1 is not JSON (Invalid \\uXXXX escape at character 10)"),
    ('{\n"a": 1\n}\n{\n"a" 1\n}', "row 2 is not JSON (Expecting ':' delimiter at line 5, character 5)"),
])
def test_faults_have_their_place_in_the_whole(file, piece, text, said):
    with pytest.raises(UserError) as caught:
        read(file, text, piece)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "has"), [
    ('{"a": 1}\n{"a": 2}', True), ('{"a": 1,}\n\n {"a": 2}\n{"a": 3},\n', True), ('{"a": 1\n{"a": 2}', True),
    ('{"a": 1}\n]', True), ('{"a": 1}', False), ('\n{"a": 1}\n\n', False), ('[{"a": 1},\n{"a": 2}]', False),
    (' {"a": 1}\n{"a" 2}', False),
    ('\n{"a": [\n{"b": 1}\n]}', False), ('{"a": {\n{"b": 1}\n}}', False), ('{"a": 1, \n"b": [\n{"b": 1}\n]}', False),
    ('["aaaaaaaaaaaaaa", {"a": 2}]\n["aaaaaaaaaaaaaa", {"a": 2}]', False),
    (2 * 'xxxxxxxxxxxxxxxxxxxx{"a": 3}\n', False), ('{"a":            [1,2,3]}\n{"a": 1}', True),
])
def test_which_texts_have_a_row_a_line(file, monkeypatch, text, has):
    """Parts of a line longer than a row are no lines."""
    monkeypatch.setattr(json_values, "_LONGEST_ROW", 20)
    file.write_text(text)
    assert has_row_a_line(file) == has


@pytest.mark.parametrize("piece", range(1, 12))
def test_a_number_is_not_cut_where_a_piece_ends(file, piece):
    for text in ("[1.5]", "[-12.25e+2, 1E-3]", '{"a": 1}\n2.5\n\n3e1'):
        assert read(file, text, piece) == (json.loads(text) if text[0] == "[" else [{"a": 1}, 2.5, 30.0])
    assert read(file, "1.5\n2e+1", piece) == [1.5, 20.0]
