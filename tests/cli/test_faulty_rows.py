"""One faulty row hides no other, and `--skip_bad_rows 1` leaves them out, counted."""

import json

import pytest
import torch

from src.data.faults import NAMED, by_kind, report_reading, usable
from src.data.read import read_pairs
from src.errors import UserError
from tests.cli.conftest import words_of

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = "\n\nHuman: Why?\n\nAssistant:"
ROWS = [GOOD, GOOD | {"chosen": " "}, GOOD | {"prompt": ""}, GOOD | {"chosen": 5}, GOOD, GOOD | {"chosen": ""}]
KINDS = {"empty chosen answer": [2, 6], "empty prompt": [3], "no text": [4]}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_all_faults_are_in_one_line_by_kind(path):
    with pytest.raises(UserError) as caught:
        usable(read_pairs(path, True), skip_bad_rows=False)
    assert str(caught.value) == (
        f"{path}: 4 of 6 rows can't be used: empty chosen answer: rows 2, 6; empty prompt: row 3; no text: row 4; the first: "
        "row 2 has an empty chosen answer; fill it in or remove the row; --skip_bad_rows 1 leaves such rows out")


def test_left_out_with_a_count(path, capsys):
    reading = read_pairs(path, True)
    assert usable(reading, skip_bad_rows=True) == [("p", "c", "r")] * 2
    report_reading(reading)
    assert capsys.readouterr().err == (f"{path}: left out 4 of 6 rows, which can't be used: empty chosen answer: rows 2, 6; "
                                       "empty prompt: row 3; no text: row 4\n")


@pytest.mark.parametrize(("name", "lines", "kinds"), [
    ("a.jsonl", [b'{"prompt": "p", "chosen": "c", "rejected": "r"}', b'{"prompt": "p"', b"[1]",
                 b'{"prompt": "\xff", "chosen": "c"}',
                 b'{"prompt": "p", "prompt": "q"}', b'{"prompt": "p", "chosen": "c\\u0000"}'],
     {"not JSON": [2], "no object": [3], "not UTF-8": [4], "repeated key": [5], "NUL character": [6]}),
    ("a.csv", [b"prompt,chosen,reject", b"p,c,r", b"p,c", b"p,\xe9,r", b"p,c\0,r", b"p,c,r,s"],
     {"number of fields": [2, 5], "not UTF-8": [3], "NUL character": [4]}),
])
def test_a_row_that_cannot_be_read_hides_no_other(tmp_path, name, lines, kinds):
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines))
    reading = read_pairs(path, True)
    assert by_kind(reading.faults) == kinds and reading.numbers == [1]
    assert usable(reading, skip_bad_rows=True) == [("p", "c", "r")]


def test_a_file_of_nothing_else_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"chosen": HH, "rejected": f"{HH} a"}) + "\n" + json.dumps({"chosen": HH, "rejected": f"{HH} a"}))
    with pytest.raises(UserError, match="none of its 2 rows can be used; .*row 1 has an empty chosen answer"):
        usable(read_pairs(path, True), skip_bad_rows=True)


def test_of_many_rows_the_first_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD] + [GOOD | {"prompt": ""}] * 3000)))
    with pytest.raises(UserError) as caught:
        usable(read_pairs(path, True), skip_bad_rows=False)
    named = ", ".join(map(str, range(2, 2 + NAMED)))
    assert f"3000 of 3001 rows can't be used: empty prompt: rows {named}, ...;" in str(caught.value)


def test_check_data_reports_good_and_bad_rows(path, call):
    flags = {"--input_csv": str(path), "--check_data": "1", "--tokenizer": "bytes"}
    code, err, out = call("rlhf_dpo_generate_save", words_of(flags), with_out=True)
    assert code == 2 and "empty chosen answer: rows 2, 6; the first:" in " ".join(err.split())
    found = json.loads(out)
    assert found["rows"] == 2 and found["bad_rows"] == {"count": 4, "rows": KINDS}
    assert found["duplicate_rows_at"] == [5]  # numbers are those of the file
    code, err, out = call("rlhf_dpo_generate_save", words_of(flags | {"--skip_bad_rows": "1"}), with_out=True)
    assert code == 0 and json.loads(out) == found


def test_the_other_rows_come_out_as_if_the_faulty_ones_were_not_there(path, good, call, tmp_path):
    (tmp_path / "clean.jsonl").write_text("\n".join(json.dumps(ROWS[number]) for number in (0, 4)))
    made = []
    for name, more in (("pairs", ["--skip_bad_rows", "1"]), ("clean", [])):
        for script, flag in (("rlhf_generate_reject_csv", "--output_csv"), ("rlhf_dpo_generate_save", "--output_save")):
            output = tmp_path / f"{name}-{script}"
            flags = good(script) | {"--input_csv": str(tmp_path / f"{name}.jsonl"), flag: str(output)}
            assert call(script, [*words_of(flags), *more])[0] == 0
            made.append(output.read_bytes())
    assert made[:2] == made[2:]


def test_every_script_leaves_them_out_and_records_it(path, good, call, tmp_path):
    for script, flags, sidecar, place in (
            ("rlhf_dpo_generate_save", {"--input_csv": path}, "--output_save", lambda told: told),
            ("rlhf_generate_reject_csv", {"--input_csv": path, "--max_tokens": "2"}, "--output_csv", lambda told: told),
            ("evaluate", {"--pairs": path}, "--output_json", lambda told: told),
            ("train", {"--train_data_file": path, "--sft": "1", "--rlhf_train_file": None}, "--proj_dir",
             lambda told: told["train_data"])):
        own = good(script) | {flag: str(value) for flag, value in flags.items()}
        own = {flag: value for flag, value in own.items() if value != "None"}
        code, err = call(script, words_of(own))
        assert code == 2 and "4 of 6 rows can't be used" in err, script
        code, err = call(script, words_of(own | {"--skip_bad_rows": "1"}))
        assert code == 0 and "left out 4 of 6 rows" in err, (script, err)
        file = {"train": f"{own[sidecar]}/config.json", "evaluate": own[sidecar]}.get(script, f"{own[sidecar]}.json")
        with open(file) as opened:
            told = place(json.load(opened))["skipped_rows"]
        assert told["count"] == 4 and sum(told["rows"].values(), []) == [2, 6, 3, 4], script
    assert len(torch.load(good("rlhf_dpo_generate_save")["--output_save"])) == 2


@pytest.mark.parametrize(("column", "value"), [("weight", 0), ("label", False), ("train", "false")])
def test_a_file_of_rows_that_are_not_to_be_learned_says_so_alone(path, good, call, column, value):
    path.write_text("\n".join(json.dumps(GOOD | {"weight": 1, column: value, "id": "a"}) for _ in range(3)))
    said = f"none of its rows is to be learned: it has only 3 rows that {column} marks as not to be learned"
    for script, flags in (("rlhf_dpo_generate_save", {"--input_csv": str(path)}),
                          ("rlhf_generate_reject_csv", {"--input_csv": str(path)}),
                          ("train", {"--rlhf_train_file": None, "--train_data_file": str(path), "--sft": "1"})):
        code, err = call(script, words_of(good(script) | flags))
        assert code == 2 and err.startswith(f"error: {path}: {said}") and err.count("\n") == 1, err


def test_marked_and_faulty_rows_together_are_both_said(path):
    path.write_text("\n".join(json.dumps(GOOD | row) for row in ({"weight": 0}, {"weight": 1, "chosen": ""})))
    said = "none of its 1 rows besides 1 row that weight marks as not to be learned can be used; .*row 2"
    with pytest.raises(UserError, match=said):
        usable(read_pairs(path, True), skip_bad_rows=True)


def test_an_error_stands_without_notes_of_what_is_unused(path, good, call):
    rows = [GOOD | {"id": "a"}] * 2
    sft = {"--rlhf_train_file": None, "--train_data_file": str(path), "--sft": "1"}
    for script, flags, texts in (
            ("rlhf_dpo_generate_save", {"--input_csv": str(path)}, [*rows, GOOD | {"chosen": ""}]),
            ("rlhf_generate_reject_csv", {"--input_csv": str(path)}, [*rows, GOOD | {"chosen": ""}]),
            ("train", sft, [*rows, GOOD | {"chosen": ""}]), ("train", sft, [GOOD | {"chosen": "c" * 1000}]),
            ("rlhf_dpo_generate_save", {"--input_csv": str(path)}, [GOOD | {"chosen": "c" * 1000, "id": "a"}])):
        path.write_text("\n".join(map(json.dumps, texts)))
        code, err = call(script, words_of(good(script) | flags))
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err


def test_what_only_marked_rows_have_is_not_called_unused(path):
    path.write_text("\n".join(map(json.dumps, [GOOD, GOOD | {"weight": 0, "system": "Be brief."}])))
    assert read_pairs(path, True).notes == ["left out 1 row that weight marks as not to be learned"]


@pytest.mark.parametrize("flag", ["--train_data_file", "--eval_file"])
def test_a_missing_file_of_texts_is_named_by_its_flag_and_alone(fails, tmp_path, flag):
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(GOOD))
    files = {"--train_data_file": good, "--eval_file": good} | {flag: tmp_path / "none.jsonl"}
    fails("train", {"--sft": 1, "--rlhf_train_file": None, **files}, f"{flag}: {tmp_path / 'none.jsonl'} does not exist")
