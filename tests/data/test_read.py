"""Every format gives the same rows, whatever the texts; every fault names its row in one line."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.conversation import clean
from src.data.read import read_table
from src.data.rows import Row
from src.errors import UserError
from tests.classic import format_prompt
from tests.data.reading import read_pairs
from tests.pairs_csv import write_pairs_csv

pytestmark = pytest.mark.usefixtures("storage")

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "hh_harmless_pairs.csv"

any_text = st.one_of(
    st.text(st.one_of(st.sampled_from('",;\r\n\'\t \\{}[]'), st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
            max_size=20),
    st.sampled_from(["NA", "null", "nan", "None", "1e5", "0012", "true", "2020-01-01", "\u2028", "{}", "[]"]))
row_lists = st.lists(st.builds(Row, *[any_text.filter(str.strip)] * 3), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("read")


def put_jsonl(path: Path, records: list, ascii_only: bool = False, newline: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(record, ensure_ascii=ascii_only) + newline for record in records).encode())
    return path


def put_all(folder: Path, records: list[dict]) -> list[Path]:
    """The same records as .jsonl, .json and .parquet, and as .csv where they are texts."""
    array, parquet = folder / "pairs.json", folder / "pairs.parquet"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    pd.DataFrame(records).to_parquet(parquet)
    pd.DataFrame(records).to_csv(folder / "pairs.csv", index=False)
    texts = all(isinstance(value, str | None) for record in records for value in record.values())
    return [put_jsonl(folder / "pairs.jsonl", records), array, parquet, *([folder / "pairs.csv"] if texts else [])]


@given(rows=row_lists, ascii_only=st.booleans(), newline=st.sampled_from(["\n", "\r\n", "\n\n"]), alias=st.booleans())
def test_jsonl_gives_the_rows(folder, rows, ascii_only, newline, alias):
    names = ("chosen", "prompt", "rejected" if alias else "reject", "id")
    records = [dict(zip(names, (row.chosen, row.prompt, row.reject, 10**30), strict=True)) for row in rows]
    assert read_pairs(put_jsonl(folder / "a.jsonl", records, ascii_only, newline), require_reject=True) == rows
    (folder / "a.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")
    assert read_pairs(folder / "a.json", require_reject=True) == rows


@settings(max_examples=40)
@given(rows=row_lists)
def test_parquet_and_csv_give_the_same_rows(folder, rows):
    pd.DataFrame(rows).to_parquet(folder / "b.parquet")
    write_pairs_csv(folder / "b.csv", rows)
    assert read_pairs(folder / "b.parquet", require_reject=True) == read_pairs(folder / "b.csv", require_reject=True) == rows


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


HISTORY = [user("hi"), assistant("ho"), user("why?")]
SEVERAL = "Human: hi\n\nAssistant: ho\n\nHuman: why?"
HH = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: why?\n\nAssistant:"


@pytest.mark.parametrize(("record", "row"), [
    # TRL's dataset formats: preference, standard and conversational, explicit and implicit.
    ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, ("The sky is", " blue.", " green.")),
    ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, ("The sky is ", "blue.", "black.")),
    ({"prompt": [user("why?")], "chosen": [assistant("so.")], "rejected": [assistant("no.")]}, ("why?", "so.", "no.")),
    ({"chosen": [user("why?"), assistant("so.")], "rejected": [user("why?"), assistant("no.")]}, ("why?", "so.", "no.")),
    ({"prompt": HISTORY, "chosen": [assistant("so.")], "rejected": [assistant("no.")]}, (SEVERAL, "so.", "no.")),
    ({"chosen": [*HISTORY, assistant("so.")], "rejected": [*HISTORY, assistant("no.")]}, (SEVERAL, "so.", "no.")),
    # The prompt beside answers that have it before them, and beside lists of the answer alone.
    ({"prompt": "hi", "chosen": [user("hi"), assistant("so.")], "rejected": [user("hi"), assistant("no.")]},
     ("hi", "so.", "no.")),
    ({"prompt": "hi", "chosen": [assistant("so.")], "rejected": [assistant("no.")]}, ("hi", "so.", "no.")),
    ({"prompt": [{"role": "system", "content": "Be brief."}, user("hi")], "chosen": "so.", "rejected": "no."},
     ("System: Be brief.\n\nHuman: hi", "so.", "no.")),
    # Anthropic's transcripts.
    ({"chosen": f"{HH} so.\n\nYes.", "rejected": f"{HH} no."}, (SEVERAL, "so.\n\nYes.", "no.")),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: so.", "rejected": "\n\nHuman: hi\n\nAssistant: no."}, ("hi", "so.", "no.")),
    ({"prompt": HH, "chosen": "so.", "reject": "no."}, (HH, "so.", "no.")),
])
def test_the_fields_formats(folder, record, row):
    for path in put_all(folder, [record, record]):  # of one kind, as a column of Parquet must be
        assert read_pairs(path, require_reject=True) == [Row(*row)] * 2


@pytest.mark.skipif(not SHARED.exists(), reason="shared data is not here")
def test_real_transcripts_are_the_same_with_the_prompt_in_a_column_and_in_the_answers(folder):
    """1,500 pairs of HH-RLHF as prompt,chosen,reject, and put back into the form that they were published in."""
    rows = read_pairs(SHARED, require_reject=True)
    published = [{part: f"\n\nHuman: {row.prompt}\n\nAssistant: {answer}"
                  for part, answer in (("chosen", row.chosen), ("rejected", row.reject))} for row in rows]
    again = read_pairs(put_jsonl(folder / "published.jsonl", published), require_reject=True)
    for row, other in zip(rows, again, strict=True):
        assert format_prompt(0, row.prompt) == format_prompt(0, other.prompt)
        assert (clean(row.chosen), clean(row.reject)) == (clean(other.chosen), clean(other.reject))


def test_before_generation_the_reject_may_be_null_or_absent(folder):
    records = [{"prompt": "a", "chosen": "b"}, {"prompt": "c", "chosen": "d", "reject": None},
               {"prompt": "e", "chosen": "f", "reject": "g"}]
    for path in put_all(folder, records):
        assert read_pairs(path, require_reject=False) == [Row("a", "b", ""), Row("c", "d", ""), Row("e", "f", "g")]
        with pytest.raises(UserError, match="row 1 has no reject; run rlhf_generate_reject_csv.py"):
            read_pairs(path, require_reject=True)
    path = put_jsonl(folder / "hh.jsonl", [{"chosen": f"{HH} so."}])
    assert read_pairs(path, require_reject=False) == [Row(SEVERAL, "so.", "")]


GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(("lines", "words"), [
    ([GOOD, '{"prompt": "p", "chosen": "c"'], ("row 2 is not JSON",)),
    ([GOOD, "", '{"a": 1}, {"b": 2}'], ("row 2 is not JSON",)),
    ([GOOD, "[1, 2]"], ("row 2 is of type list",)), ([GOOD, "5"], ("row 2 is of type int",)),
    ([GOOD, GOOD | {"chosen": 5}], ("row 2: its chosen is of type int",)),
    ([GOOD, GOOD | {"prompt": {"text": "x"}}], ("row 2: its prompt is of type dict",)),
    ([GOOD, GOOD | {"prompt": " "}], ("row 2 has an empty prompt",)),
    ([GOOD, GOOD | {"prompt": None}], ("row 2 has an empty prompt",)),
    ([GOOD, GOOD | {"chosen": None}], ("row 2 has an empty chosen",)),
    ([GOOD, GOOD | {"rejected": "\n"}], ("row 2 has no reject",)),
    ([GOOD, GOOD | {"chosen": "a\0b"}], ("row 2: its chosen holds a NUL",)),
    ([GOOD, '{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}'], ("row 2: its prompt holds half of a character",)),
    ([GOOD | {"reject": "r"}], ("both reject and rejected",)),
    ([{"question": "p", "answer": "c"}], ("lacks chosen", "question, answer")),
    ([{"id": "p", "answer": "c"}], ("lacks prompt and chosen", "id, answer")),
    ([{"chosen": "a b", "rejected": "x y"}], ("row 1", "do not begin with a common prompt")),
    ([{"chosen": "same text", "rejected": "same text"}], ("row 1", "do not begin with a common prompt")),
    ([{"chosen": f"{HH} a", "rejected": "\n\nHuman: hi\n\nAssistant: b"}], ("row 1", "not the same conversation")),
    ([{"chosen": f"{HH} a", "rejected": "plain"}], ("row 1", "the other is not")),
    ([{"chosen": HH, "rejected": HH}], ("row 1 has an empty chosen answer",)),
    ([{"chosen": [user("a")], "rejected": [user("b")]}], ("row 1", "does not end in the assistant's answer")),
    ([{"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"}], ("row 1", "its prompt does not end")),
    ([{"prompt": [user("a")], "chosen": [assistant("b"), user("c"), assistant("d")],
       "rejected": [assistant("b"), user("c"), assistant("e")]}], ("row 1", "several turns")),
    ([GOOD, GOOD | {"prompt": [{"role": "tool", "content": "x"}]}], ("row 2: its prompt, message 1,", "'tool'")),
    (["[" * 100_000 + "]" * 100_000], ("row 1 can't be read as JSON",)), (['{"prompt": ' + "9" * 5000 + "}"], ("row 1",)),
    ([], ("empty",)), (["", " "], ("empty",)), (["[]"], ("empty",)),
])
def test_faults_name_the_row(folder, lines, words):
    path = folder / "bad.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    with pytest.raises(UserError) as caught:
        read_pairs(path, require_reject=True)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_a_byte_that_is_not_utf8_names_its_row(folder):
    path = folder / "latin.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n\n{"prompt": "caf\xe9"}')
    with pytest.raises(UserError, match="row 2: byte 0xe9 is not UTF-8"):
        read_pairs(path, require_reject=True)


@given(data=st.one_of(st.binary(max_size=40), st.binary(max_size=20).map(lambda tail: b'{"prompt": "p", "chosen": ' + tail)),
       ending=st.sampled_from(["jsonl", "json", "parquet", "arrow", "csv", "tsv", "csv.gz", "save"]))
def test_any_bytes_are_read_or_refused_in_one_line(folder, data, ending):
    path = folder / f"any.{ending}"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_pairs(path, require_reject=True)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_parquet_that_is_cut_off(folder):
    pd.DataFrame([GOOD]).to_parquet(folder / "cut.parquet")
    data = (folder / "cut.parquet").read_bytes()
    for length in range(0, len(data), 97):
        (folder / "cut.parquet").write_bytes(data[:length])
        with pytest.raises(UserError, match="can't be read as Parquet"):
            read_pairs(folder / "cut.parquet", require_reject=True)


def test_an_arrow_stream_that_is_cut_off_or_none(folder):
    table = pyarrow.Table.from_pylist([GOOD] * 3)
    for new in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
        with new(folder / "cut.arrow", table.schema) as writer:
            writer.write_table(table)
        assert len(read_pairs(folder / "cut.arrow", require_reject=True)) == 3
        data = (folder / "cut.arrow").read_bytes()
        for cut in (data[:len(data) // 2], data[:100], b"", b"prompt,chosen,reject\np,c,r\n"):
            (folder / "cut.arrow").write_bytes(cut)
            with pytest.raises(UserError, match="cut.arrow: can't be read as Arrow"):
                read_pairs(folder / "cut.arrow", require_reject=True)


def test_labels_of_rows_and_columns_of_other_types_do_no_harm(folder):
    """What pandas and `datasets` write beside the texts: labels, dates, categories, missing numbers, dictionaries, bytes."""
    frame = pd.DataFrame([GOOD, GOOD], index=[5, 7]).assign(
        day=pd.Timestamp("2020-01-01", tz="UTC"), kind=pd.Categorical(["a", "b"]), score=[1.5, None], more=[{"a": [1]}, None],
        raw=b"x")
    frame.to_parquet(folder / "labels.parquet")
    table = read_table(folder / "labels.parquet")
    assert table.names == [*GOOD, "day", "kind", "score", "more", "raw"]
    assert [set(GOOD) <= set(record) for record in table.records] == [True] * 2
    assert table.records[0]["more"] == {"a": [1]} and not {"score", "more"} & set(table.records[1])
    frame.set_index("prompt").to_parquet(folder / "labels.parquet")  # a column like the others, which pandas makes labels
    assert [row.prompt for row in read_pairs(folder / "labels.parquet", require_reject=True)] == ["p", "p"]


def test_parquet_without_pyarrow_says_what_to_install(folder, monkeypatch):
    pd.DataFrame([GOOD]).to_parquet(folder / "c.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="Parquet needs pyarrow; pip install pyarrow"):
        read_pairs(folder / "c.parquet", require_reject=True)


LARGE = 200_000
PAIR = {"chosen": "yes", "reject": "no"}


@pytest.mark.parametrize(("ending", "text"), [
    ("jsonl", json.dumps({"prompt": "\n" * LARGE + "hello", **PAIR})),
    ("jsonl", json.dumps({"prompt": "[{'role': 'user', 'content': \"" + '\\"' * LARGE, **PAIR})),
    ("jsonl", json.dumps({"prompt": "[{'role': 'user', 'content': '" + "\\'" * LARGE + "\\", **PAIR})),
    ("csv", ",".join(["prompt", "chosen", "reject", *map(str, range(LARGE))]) + "\na,b,c" + ",1" * LARGE),
    ("jsonl", "\n".join(json.dumps({"prompt": "a", **PAIR, **{f"{row} {key}": 1 for key in range(30)}}) for row in range(5000))),
    ("jsonl", '{"a": 1, ' + ", ".join(f'"{key}": 1' for key in range(LARGE)) + ', "a": 2}'),
], ids=["blank lines", "an unclosed string", "one that ends in a backslash", "columns", "keys", "a repeated key"])
def test_time_grows_as_the_file_does(tmp_path, ending, text):
    """Each of them takes minutes to hours where a part of the text is looked at again and again; now under a second."""
    path = tmp_path / f"large.{ending}"
    path.write_text(text)
    started = time.process_time()
    with contextlib.suppress(UserError):
        read_pairs(path, require_reject=True)
    assert time.process_time() - started < 20
