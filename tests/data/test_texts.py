"""No text reaches a tokenizer with what no text has, a NUL or half of a character, in whatever form a file holds it."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from src.data.examples import read_examples
from src.data.read import read_pairs, read_table

pytestmark = pytest.mark.usefixtures("storage")

PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
BAD = "a@b"  # where the character comes


def one(role: str, content: object = BAD) -> list[dict]:
    return [{"role": role, "content": content}]


ROWS = {
    "prompt": PAIR | {"prompt": BAD}, "chosen": PAIR | {"chosen": BAD}, "reject": PAIR | {"rejected": BAD},
    "a message": PAIR | {"chosen": one("assistant"), "rejected": one("assistant", "c")},
    "parts": PAIR | {"prompt": one("user", [{"type": "text", "text": BAD}, {"type": "text", "text": "c"}])},
    "parts that are texts": PAIR | {"prompt": one("user", ["c", BAD])},
    "ShareGPT": PAIR | {"prompt": [{"from": "human", "value": BAD}]},
    "a message without a list": PAIR | {"prompt": one("user")[0]},
    "messages as JSON": PAIR | {"prompt": '[{"role": "user", "content": "a@b"}]'},
    "messages as Python": PAIR | {"prompt": "[{'role': 'user', 'content': 'a@b'}]"},
    "messages as numpy": PAIR | {"prompt": "array([{'role': 'user', 'content': 'x'}\n {'role': 'user', 'content': 'a@b'}],"
                                           " dtype=object)"},
    "system": PAIR | {"system": BAD}, "a system message": PAIR | {"system": one("system")},
    "history": PAIR | {"history": [[BAD, "c"]]}, "history's answer": PAIR | {"history": [["c", BAD]]},
    "history as text": PAIR | {"history": '[["c", "a@b"]]'},
    "history of messages": PAIR | {"history": [*one("user"), *one("assistant", "c")]},
    "input": PAIR | {"input": BAD}, "context": PAIR | {"context": BAD},
    "transcripts": {"chosen": "\n\nHuman: a@b\n\nAssistant: c", "rejected": "\n\nHuman: a@b\n\nAssistant: d"},
    "a shared beginning": {"chosen": "what is a@b c", "rejected": "what is a@b d"},
    "a thumb's prompt": {"prompt": BAD, "completion": "c", "label": True},
    "a thumb's answer": {"prompt": "q", "completion": BAD, "label": False},
    "a thumb's conversation": {"messages": [*one("user"), *one("assistant", "c")], "label": 1},
    "a list": {"prompt": "q", "responses": ["c", BAD], "scores": [1, 2]},
    "a list's prompt": {"prompt": BAD, "responses": ["c", "d"], "scores": [1, 2]},
    "a list's objects": {"prompt": "q", "answers": [{"answer": "c", "rank": 1}, {"answer": BAD, "rank": 2}]},
    "a list's messages": {"prompt": "q", "responses": [one("assistant", "c"), one("assistant")], "scores": [1, 2]},
    "a list as text": {"prompt": "q", "responses": '["c", "a@b"]', "scores": "[1, 2]"},
    "two answers": {"prompt": "q", "response1": BAD, "response2": "c", "overall_preference": 1},
    "exchanges": {"conversation": [{"human": BAD, "assistant": "c"}], "rejected_response": "d"},
    "implicit prompts": {"chosen": [*one("user"), *one("assistant", "c")], "rejected": [*one("user"), *one("assistant", "d")]},
}
TEXTS = {"text": {"text": BAD}, "prompt": {"prompt": BAD, "completion": "c"}, "completion": {"prompt": "c", "completion": BAD},
         "messages": {"messages": [*one("user"), *one("assistant", "c")]}}


def escaped(row: dict, escape: str) -> str:
    """The row as JSON; within a text that holds messages itself, the escape is one of that text's."""
    return json.dumps({key: value.replace("@", escape) if isinstance(value, str) and value.startswith(("[", "array")) else value
                       for key, value in row.items()}).replace("@", escape)


def check(reading, count: int) -> None:
    assert not reading.rows and len(reading.faults) == count
    for fault in reading.faults:
        assert fault.kind == ("NUL character" if fault.row % 2 else "not UTF-8")
        assert f"row {fault.row}" in fault.message and "\n" not in fault.message
        assert ("a NUL character; remove it" in fault.message) == (fault.row % 2 == 1)


@pytest.mark.parametrize("form", ROWS)
def test_in_json(tmp_path, form):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(escaped(ROWS[form], escape) + "\n" for escape in (r"\u0000", r"\ud800", r"\u0000", r"\udfff\ud83d")))
    check(read_pairs(path, require_reject=True), 4)


@pytest.mark.parametrize("form", TEXTS)
def test_in_texts_to_train_on(tmp_path, form):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(escaped(TEXTS[form], escape) + "\n" for escape in (r"\u0000", r"\ud800")))
    check(read_examples(read_table(path)), 2)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("quote", ['""', "'"])
def test_in_messages_within_a_cell(tmp_path, name, quote):
    separator = "\t" if name.endswith("tsv") else ","
    cells = (f'"[{{{quote}role{quote}: {quote}user{quote}, {quote}content{quote}: {quote}a{escape}b{quote}}}]"'
             for escape in (r"\u0000", r"\ud800"))
    lines = (separator.join(line) for line in (("prompt", "chosen", "reject"), *((cell, "b", "c") for cell in cells)))
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    check(read_pairs(tmp_path / name, require_reject=True), 2)


@pytest.mark.parametrize("column", [["a\0b"], [[{"role": "user", "content": "a\0b"}]]])
def test_in_parquet(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column, "chosen": ["b"], "reject": ["c"]}), tmp_path / "rows.parquet")
    check(read_pairs(tmp_path / "rows.parquet", require_reject=True), 1)


def test_in_what_nothing_reads_it_does_no_harm(tmp_path):
    rows = (PAIR | {"other": BAD, "k@": 1}, PAIR | {"prompt": [{"role": "user", "content": "q", "x@": BAD}]},
            PAIR | {"label": BAD})
    lines = [escaped(row, escape) + "\n" for row in rows for escape in (r"\u0000", r"\ud800")]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    reading = read_pairs(tmp_path / "rows.jsonl", require_reject=True)
    assert len(reading.rows) == 6 and not reading.faults and "not used" in reading.notes[0]


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07\x7f\x85", "\ufffe\uffff", "\u202e", "\ufeff", "\U0010ffff", "e\u0301",
                                  "<|endoftext|>"])
def test_everything_else_is_text(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR | {"chosen": f"a{text}b"}))
    assert read_pairs(tmp_path / "rows.jsonl", require_reject=True).rows[0].chosen == f"a{text}b"


@pytest.mark.parametrize("value", ["9" * 4000, "[" * 900 + "]" * 900, '"' + "x" * 10_000 + '"'])
@pytest.mark.parametrize("message", ['{"role": @, "content": "a"}', '{"role": "user", "content": "a", "weight": @}',
                                     '{"role": "user", "content": [{"type": @, "text": "a"}]}'])
def test_a_value_that_can_t_be_written_out_is_told_in_short(tmp_path, message, value):
    row = '{"prompt": [' + message.replace("@", value) + '], "chosen": "b", "reject": "c"}'
    (tmp_path / "rows.jsonl").write_text(row)
    faults = read_pairs(tmp_path / "rows.jsonl", require_reject=True).faults
    assert len(faults) == 1 and len(faults[0].message) < len(str(tmp_path)) + 250


def test_a_number_that_python_refuses_to_write_out_is_told_in_short(tmp_path):
    message = "[{'role': 'user', 'content': 'a', 'weight': 0x" + "9" * 5000 + "}]"
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR | {"prompt": message}))
    faults = read_pairs(tmp_path / "rows.jsonl", require_reject=True).faults
    assert len(faults) == 1 and "has weight of type int; supported are 0 and 1" in faults[0].message
