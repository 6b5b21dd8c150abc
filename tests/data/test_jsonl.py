"""The forms that a table has in JSON, as pandas and the json module write them, and what is refused."""

import json

import pandas as pd
import pytest

from src.data.faults import BadRow
from src.data.read import read_table
from src.errors import UserError

pytestmark = pytest.mark.usefixtures("storage")

ROWS = [{"prompt": "p{", "chosen": 'c\n"]'}, {"prompt": "é", "chosen": "c, d"}, {"prompt": "q", "chosen": "\u2028"}]
FRAME = pd.DataFrame(ROWS, index=["x", "y", "z"])
TALK = [{"role": "user", "content": "hi"}]


def records(path, text: str) -> list:
    path.write_bytes(text.encode())
    return list(read_table(path).records)


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".csv", ".txt"])
def test_forms_of_a_table(tmp_path, indent, ending):
    path = tmp_path / f"a{ending}"
    one_by_one = [json.dumps(row, indent=indent) for row in ROWS]
    texts = [json.dumps(whole, indent=indent) for whole in (
        ROWS, {"version": "1.0", "data": ROWS}, {"train": ROWS}, {"data": ROWS, "index": []},
        *map(FRAME.to_dict, ("list", "dict", "index")))]
    texts += [FRAME.to_json(orient=orient, indent=indent) for orient in ("records", "columns", "index", "split")]
    texts += [between.join(one_by_one) + end
              for between, end in (("\n", ""), ("\n\n", "\n"), ("\r", ""), ("\r\n", " "), (",\n", ",\n"))]
    texts += [f"[{', '.join(one_by_one)},\n]", f"\ufeff\n {texts[0]}\n"]
    for text in texts:
        assert records(path, text) == ROWS, text
    assert [row | {"index": label} for row, label in zip(ROWS, FRAME.index, strict=True)] == records(
        path, FRAME.to_json(orient="table", indent=indent))


@pytest.mark.parametrize("row", [
    {"prompt": "p", "chosen": "c", "sources": [{"url": "u"}]}, {"messages": TALK}, {"prompt": TALK, "chosen": TALK},
    {"dialog": TALK}, {"instruction": "i", "output": "o", "history": [["a", "b"]]}, {"messages": []}, {"error": "none"},
    {"a": {"b": "c"}, "d": {"e": "f"}},
])
def test_a_row_alone_is_a_row(tmp_path, row):
    assert records(tmp_path / "a.json", json.dumps(row)) == [row]
    assert records(tmp_path / "a.json", json.dumps(row, indent=1)) == [row]


def test_columns_of_messages(tmp_path):
    assert records(tmp_path / "a.json", json.dumps({"messages": [TALK, TALK]})) == [{"messages": TALK}] * 2


@pytest.mark.parametrize("row", [
    {"prompt": "p", "chosen": "c", "from": "x"}, {"Prompt": "p", "author": "x"}, {"from": "x", "input": "p"},
    {"role": "x", "response": "p", "answer": "y"}, {"speaker": "x", "messages": TALK}, {"Author": "x", "text": "y"},
])
def test_rows_that_name_an_author_are_no_messages(tmp_path, row):
    assert records(tmp_path / "a.json", json.dumps({"data": [row, row]})) == [row, row]


def test_a_single_row_with_a_line_an_item(tmp_path):
    tools, question = {"prompt": "a", "tools": [{"x": 1}, {"x": 2}]}, {"messages": [TALK[0] | {"question": "q"}]}
    for row in ({"messages": TALK * 2}, tools, question):
        assert records(tmp_path / "a.json", json.dumps(row, indent=0)) == [row]


@pytest.mark.parametrize(("text", "words"), [
    ('%s{"prompt": "c", "chosen": tru}\n]}', "value 2 of 'data' is not JSON (Expecting value at line 3, character 27)"),
    ('%s{"prompt": "b", "prompt": "c"}]}', "value 2 of 'data' has the key 'prompt' more than once"),
    ('%s{"prompt": "b"}\n', "'data' is not JSON (Expecting ',' delimiter at line 4, character 1)"),
    ('%s{"prompt": "\udcff"}\n]}', "value 2 of 'data': byte 0xff"),
])
@pytest.mark.parametrize("begin", ['{"data": [\n{"prompt": "a"},\n', '{"x": 1, "data":[\n{"prompt": "a"},\n'])
def test_a_fault_in_an_object_with_a_line_a_row_is_not_one_of_lines(tmp_path, begin, text, words):
    (tmp_path / "a.json").write_bytes((text % begin).encode(errors="surrogateescape"))
    with pytest.raises(UserError) as caught:
        read_table(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: {words}")


@pytest.mark.parametrize("text", ['{"data": [\n%s\n]}', '{"version": 1, "data": [\n%s\n], "prompt": ["x"]\n},\n'])
def test_rows_of_an_object_may_have_a_line_each(tmp_path, text):
    assert records(tmp_path / "a.json", text % ",\n".join(map(json.dumps, ROWS))) == ROWS


def test_names_in_capitals(tmp_path):
    rows = [{"PROMPT": "p", "Chosen": "c"}, {"PROMPT": "q", "Chosen": "d"}]
    frame = pd.DataFrame(rows, index=["x", "y"])
    for orient in ("columns", "index"):
        assert records(tmp_path / "a.json", frame.to_json(orient=orient)) == rows
    assert records(tmp_path / "a.json", json.dumps({"Prompt": "p", "data": rows})) == [{"Prompt": "p", "data": rows}]


@pytest.mark.parametrize("row", [
    {name: {"role": "user", "content": "Why?"} for name in ("prompt", "chosen")},
    {name: {"from": ["human", "gpt"], "value": ["Why?", "So."]} for name in ("chosen", "rejected")},
])
def test_a_single_row_of_messages_is_no_table_of_columns(tmp_path, row):
    assert records(tmp_path / "a.json", json.dumps(row)) == [row]


def test_a_row_under_a_key_that_is_no_object(tmp_path):
    found = records(tmp_path / "a.json", json.dumps({"data": [ROWS[0], 5]}))
    assert found[0] == ROWS[0] and found[1].kind == "no object" and "row 2 is of type int" in str(found[1])


def test_long_names_are_shortened(tmp_path):
    long = 100_000 * "x"
    for text in ('{"columns": ["%s", "%s"], "data": [[1, 2]]}', '{"%s": [1, tru], "%s": 2}', '{"a": 1, "%s": 2, "%s": 3}'):
        with pytest.raises(UserError) as caught:
            records(tmp_path / "a.json", text % (long, long))
        assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_rows_of_many_columns_keep_their_order(tmp_path):
    columns = {f"prompt{number}" if number else "prompt": {str(label): number for label in range(20)} for number in range(20)}
    [*rows] = map(list, records(tmp_path / "a.json", json.dumps(columns)))
    assert rows == [list(columns)] * 20


def test_cells_without_a_row_in_every_column(tmp_path):
    columns = {"prompt": {"b": "p", "a": "q"}, "chosen": {"a": "r", "c": "s"}, "x": {}, "reject": {"b": None, "c": "t"}}
    assert records(tmp_path / "a.json", json.dumps(columns)) == [
        {"prompt": "p"}, {"prompt": "q", "chosen": "r"}, {"chosen": "s", "reject": "t"}]


def test_nan_and_null_are_missing(tmp_path):
    text = json.dumps([ROWS[0] | {"chosen": float("nan")}, ROWS[1] | {"chosen": None}])
    assert "NaN" in text and records(tmp_path / "a.json", text) == [{"prompt": "p{"}, {"prompt": "é"}]


@pytest.mark.parametrize(("text", "row", "kind", "words"), [
    ('{"prompt": "a"}\n\n{"prompt": }\n{"prompt": "c"}', 2, "not JSON", "Expecting value at character 12"),
    ('{"prompt" "a"}\n{"prompt": "b"}\n{"prompt": "c"}', 1, "not JSON", "Expecting ':' delimiter at character 11"),
    ('{"prompt": "a"}\n{"prompt": "b"} {"prompt": "b"}\n{"prompt": "c"}', 2, "not JSON", "Extra data"),
    ('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n{"prompt": "c"}', 2, "repeated key", "the key 'prompt' more than once"),
    ('[{"prompt": "a"}, 5, {"prompt": "c"}]', 2, "no object", "is of type int where an object"),
    ('{"prompt": "a"}\n{"prompt": "b"}\n["prompt", "c"]', 3, "no object", "is of type list where an object"),
    ('{"columns": ["prompt"], "data": [["a"], ["b", "c"], ["d"]]}', 2, "number of values", 'has 2 values where "columns" has 1'),
    ('{"columns": ["prompt"], "data": [["a"], "b", ["c"]]}', 2, "no list", "is of type str where a list"),
])
def test_a_row_that_is_none_leaves_the_others(tmp_path, text, row, kind, words):
    found = records(tmp_path / "a.jsonl", text)
    assert [isinstance(record, BadRow) for record in found] == [number == row for number in (1, 2, 3)]
    assert found[row - 1].kind == kind and words in str(found[row - 1])
    assert str(found[row - 1]).startswith(f"{tmp_path / 'a.jsonl'}: row {row} ")


@pytest.mark.parametrize(("text", "words"), [
    ('[{"prompt": "a"},\n{"prompt" "b"}]', "row 2 is not JSON (Expecting ':' delimiter at line 2, character 11)"),
    ('[{"prompt": "a"}\n{"prompt": "b"}]', "row 1 is not JSON (a comma is expected after it in line 2)"),
    ('[{"prompt": "a"}, {"prompt": "b"}', "the list does not end after row 2"), ('[{"prompt": "a"}, ', "the list does not end"),
    ('[{"prompt": "a"}]\n[{"prompt": "b"}]', "something follows the list of rows in line 2"),
    ('{\n"prompt": "a"\n}\n{\n"prompt" "b"\n}', "row 2 is not JSON (Expecting ':' delimiter at line 5, character 10)"),
    ("{'prompt': 'a'}\n{'prompt': 'b'}", "row 1 is not JSON (Expecting property name enclosed in double quotes"),
    ('{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}', "holds several lists of rows (train, test); save the one"),
    ('{"prompt": ["a", "b"], "chosen": ["c"]}', "columns differ in length (2 of prompt, 1 of chosen)"),
    ('{"columns": ["prompt", "prompt"], "data": [["a", "b"]]}', "its columns have the name 'prompt' more than once"),
    ('{"prompt": ["a", "b"], "chosen": ["c", tru]}', "value 2 of 'chosen' is not JSON (Expecting value at character 40)"),
    ('{"data": [{"prompt": "a"},\n {"prompt": "b"}\n', "'data' is not JSON (Expecting ',' delimiter at line 3, character 1)"),
    ('{"data": [{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]}', "value 2 of 'data' has the key 'prompt' more than once"),
    ('{"prompt": {"0": "a", "1": "b", "0": "c"}}', "'prompt' has the key '0' more than once"),
    ('{"prompt": {"0": "a", "1": [}}', "'1' of 'prompt' is not JSON (Expecting value at character 29)"),
    ('{"prompt": ["a"], "chosen": ["b"], "prompt": ["c"]}', "row 1 has the key 'prompt' more than once"),
    ('[["p", "c"]]', "row 1 is of type list"), ("null", "row 1 is of type NoneType"), ("[]", "empty"),
])
def test_what_has_no_rows_is_refused(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        records(tmp_path / "a.json", text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.json'}: ") and words in message and "\n" not in message


@pytest.mark.parametrize(("data", "words"), [
    (b'[{"prompt": "a"},\n{"prompt": "\xff"}]', "row 2: byte 0xff"),
    (b'{\n"prompt": "a"\n}\n{\n"prompt": "\xff"}', "row 2: byte 0xff"),
    (b'\n{"prompt": "a"}\n\n{"prompt": "\xff"}', "row 2: byte 0xff"), (b'{"prompt": "\xff"}', "row 1: byte 0xff"),
    (b'{"prompt": "a"}\n{"prompt": "\0"}', "row 2: holds a NUL"),
    (b'{\n"prompt": "\xff"\n}\n{\n"prompt": "b"\n}', "row 1: byte 0xff"),
    (b'{"prompt": "\xff"} {"prompt": "b"}', "row 1: byte 0xff"),
    (b'{"data": [{"prompt": "a"}, {"prompt": "\xff"}]}', "value 2 of 'data': byte 0xff"),
    (b'{"prompt": {"0": "a", "1": "\xff"}}', "'1' of 'prompt': byte 0xff"),
    (b'{"prompt": ["a"], "\xff": ["b"]}', "row 1: byte 0xff"),
])
def test_bytes_that_are_no_text_name_their_row(tmp_path, data, words):
    (tmp_path / "a.json").write_bytes(data)
    try:
        faults = [record for record in read_table(tmp_path / "a.json").records if isinstance(record, BadRow)]
    except UserError as error:  # of a file that has no other row
        faults = [error]
    assert len(faults) == 1 and words in str(faults[0])
