"""docs/data.md is true: each example row in its tables is read, in every kind of file, and becomes what the page states."""

import json
import re
from pathlib import Path

import pandas as pd
import pyarrow
import pytest

from src.data import columns, lists, preferences
from src.data.examples import read_texts
from src.data.faults import usable
from src.data.ranking import pair_rule
from src.data.read import read_pairs
from src.data.rows import Row
from src.errors import UserError
from src.tokenizer import load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
FORMS = "| form | a row | becomes |"
TOOLS = "| what | TRL | LLaMA-Factory | Axolotl | ms-swift | Argilla, distilabel | OpenRLHF |"
BYTES = load_tokenizer("bytes")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(header: str) -> list[list[str]]:
    """The cells of all tables under this header."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = []
    for at in (at for at, line in enumerate(lines) if line == header):
        end = next(place for place in range(at, len(lines)) if not lines[place].startswith("|"))
        rows += [cells(line) for line in lines[at + 2:end]]
    return rows


def in_code(cell: str) -> list[str]:
    return re.findall("`([^`]*)`", cell)


EXAMPLES = [(form, json.loads(in_code(row)[0]), [json.loads(code) for code in in_code(becomes)])
            for form, row, becomes in table(FORMS)]
PREFERENCES = [example for example in EXAMPLES if isinstance(example[2][0], list)]
TEXTS = [example for example in EXAMPLES if isinstance(example[2][0], str)]


def put(path: Path, record: dict) -> Path:
    """The record twice: a file that is a single object could hold columns."""
    text = "\n".join([json.dumps(record)] * 2).encode()
    if path.suffix == ".parquet":
        pd.DataFrame([record] * 2).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_bytes(text)
    else:
        with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as stream:
            stream.write(text)
    return path


def test_the_page_has_every_form():
    assert len(PREFERENCES) > 30 and len(TEXTS) > 5 and len(PREFERENCES) + len(TEXTS) == len(EXAMPLES)
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("`{") == len(EXAMPLES) + text.count('`{"role"')  # no example stands where this test does not look


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize(("form", "record", "rows"), PREFERENCES, ids=[form[:40] for form, *_ in PREFERENCES])
def test_a_preference_becomes_what_the_page_states(tmp_path, form, record, rows, ending):
    which, gap = re.search(r"--pairs (\w+)", form), re.search(r"--min_gap (\d+)", form)
    rule = pair_rule(which[1] if which else None, float(gap[1]) if gap else None)
    reading = read_pairs(put(tmp_path / f"rows.{ending}", record), require_reject=True, rule=rule)
    assert not reading.faults, reading.faults
    assert reading.rows == [Row(*row) for row in rows] * 2
    assert not any("not used" in note for note in reading.notes) or "beside" in form, reading.notes


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize(("form", "record", "texts"), TEXTS, ids=[form[:40] for form, *_ in TEXTS])
def test_a_text_becomes_what_the_page_states(tmp_path, form, record, texts, ending):
    # Of the template that is drawn first.
    read, _ = read_texts(put(tmp_path / f"rows.{ending}", record), BYTES, 1000, seed=0, on_prompt=False)
    shown, inside = "", False
    for token, trained in zip(read[0].tokens, read[0].trained, strict=True):
        shown += ("[" if trained else "]") if trained != inside else ""
        shown, inside = shown + chr(token), trained
    assert [shown + "]" * inside] == texts


KNOWN = {
    "prompt": (*columns.PROMPTS, *columns.ABOUT), "its input": columns.ABOUT, "system message": columns.SYSTEMS,
    "earlier turns": columns.HISTORIES, "conversation": columns.CONVERSATIONS, "good answer": preferences.CHOSEN,
    "bad answer": columns.REJECT, "answer": columns.ANSWERS, "thumb": columns.THUMBS, "list of answers": lists.ANSWER_LISTS,
    "scores": lists.SCORE_LISTS}


def test_the_names_of_other_tools_are_known():
    rows = table(TOOLS)
    assert {what for what, *_ in rows} == KNOWN.keys()
    for what, *tools in rows:
        assert all(name in KNOWN[what] for tool in tools for name in in_code(tool)), what


def test_the_columns_of_the_page_are_those_that_are_read():
    page = {name for column, others, _ in table("| column | other names | read as |") for name in in_code(column + others)}
    read = {name for names in KNOWN.values() for name in names} | {*columns.FLAGS, *lists.RANK_LISTS}
    assert page == read


FORMS_TOLD = ("; preferences are pairs (prompt,chosen,rejected), answers with a thumb (prompt,completion,label) or lists of "
              "answers (prompt,responses,scores)")


@pytest.mark.parametrize(("record", "words", "mended"), [
    ({"instruction": "Why?", "response": "So.", "score": 1}, "name score label if it is 1 or 0",
     {"instruction": "Why?", "response": "So.", "label": 1}),
    ({"prompt": "Why?", "completion": "So.", "labels": True}, "name labels label if it is 1 or 0",
     {"prompt": "Why?", "completion": "So.", "label": True}),
    ({"prompt": "Why?", "Response": "So.", "helpfulness": 3}, "as a list responses, and their numbers as a list scores",
     {"prompt": "Why?", "responses": ["So.", "No."], "scores": [3, 1]}),
    ({"prompt": "Why?", "completions": ["So.", "No."]}, "give the entries of completions their scores, in a list scores",
     {"prompt": "Why?", "completions": ["So.", "No."], "scores": [2, 1]}),
    ({"prompt": "Why?", "answers": ["So.", "No.", "Hm."]}, "the entries of answers .* or their ranks, in a list ranks",
     {"prompt": "Why?", "answers": ["So.", "No.", "Hm."], "ranks": [1, 2, 3]}),
    ({"prompt": "Why?", "completions": ["Since.", "So."], "labels": [True, False]}, "labels of the steps of an answer",
     {"prompt": "Why?", "completion": "Since. So.", "label": False}),
    ({"prompt": "Why?"}, "prompt alone is not enough", {"prompt": "Why?", "chosen": "So.", "reject": "No."}),
    ({"history": "Why?"}, "history alone is not enough", {"history": "Why?", "chosen": "So.", "reject": "No."}),
    ({"prompt": "Why?", "rejected": "No."}, "name the column of the good answers chosen",
     {"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
    ({"instruction": "Why?", "output": "So."}, "name output chosen if all are good, and rlhf_generate_reject_csv.py writes",
     {"instruction": "Why?", "chosen": "So.", "reject": "No."}),
    ({"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}, "add thumbs as a column label",
     {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], "label": True}),
    ({"x": "Why?", "y": "So."}, "lacks prompt and chosen .found: x, y.", {"prompt": "Why?", "chosen": "So.", "rejected": "No."}),
])
def test_what_is_not_read_is_told_what_to_do(tmp_path, record, words, mended):
    with pytest.raises(UserError, match=words) as caught:
        read_pairs(put(tmp_path / "rows.jsonl", record), require_reject=True)
    assert str(caught.value).endswith(FORMS_TOLD) and "lacks " in str(caught.value) and "\n" not in str(caught.value)
    assert usable(read_pairs(put(tmp_path / "rows.jsonl", mended), require_reject=True), skip_bad_rows=False)


@pytest.mark.parametrize(("record", "words"), [
    ({"chosen": [{"role": "user", "content": "Why?"}], "completion": "So.", "label": True}, "name chosen prompt if it holds"),
    ({"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "No.", "score_0": 1, "score_1": -1},
     "its question is of type dict"),
    ({"prompt": [{"role": "tool", "content": "5"}], "chosen": "So.", "rejected": "No."}, "has the role 'tool'"),
])
def test_what_is_not_read_is_refused_in_a_line(tmp_path, record, words):
    with pytest.raises(UserError, match=words) as caught:
        usable(read_pairs(put(tmp_path / "rows.jsonl", record), require_reject=True), skip_bad_rows=False)
    assert "\n" not in str(caught.value)
