"""Lists of scored answers and single answers with a thumb, through the scripts: what is made, reported, and refused."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import words_of
from tests.data.test_binidx import put

GENERATE, PREPARE, EVALUATE = "rlhf_generate_reject_csv", "rlhf_dpo_generate_save", "evaluate"
LISTS = [
    {"instruction": "What is one?", "completions": [{"response": text, "overall_score": score} for text, score in (
        ("A number.", 9), ("No.", 1), ("It is.", 5))]},
    {"instruction": "What is two?", "completions": [{"response": "A number.", "overall_score": 5},
                                                    {"response": "No.", "overall_score": 5}]}]
THUMBS = [{"prompt": "What is one?", "completion": "A number.", "label": True},
          {"prompt": "What is two?", "completion": "No.", "label": False}]
PAIRS = [{"prompt": "What is one?", "chosen": "A number.", "rejected": "No."}]


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    for name, records in (("lists", LISTS), ("thumbs", THUMBS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("lists", "thumbs", "pairs")}


@pytest.mark.parametrize(("flags", "count", "facts"), [
    ({}, 1, {"rule": "best_worst", "min_gap": 0.0}), ({"--pairs": "all"}, 3, {"rule": "all", "min_gap": 0.0}),
    ({"--pairs": "adjacent"}, 2, {"rule": "adjacent", "min_gap": 0.0}),
    ({"--pairs": "all", "--min_gap": "5"}, 1, {"rule": "all", "min_gap": 5.0}),
])
def test_lists_are_prepared_by_the_rule(call, good, files, flags, count, facts):
    given = good(PREPARE) | {"--input_csv": files["lists"], "--reference": "0", "--strategy": None} | flags
    code, err = call(PREPARE, words_of(given))
    assert code == 0 and "no effect" not in err, err
    assert err.count("2 lists of answers make ") == 1 and "1 of them makes none (all scores equal: 1)" in err
    pairs = torch.load(given["--output_save"], weights_only=True)
    sidecar = json.loads(Path(given["--output_save"] + ".json").read_text())
    assert len(pairs) == sidecar["lists"]["pairs"] == count and len({tuple(pair[0]) for pair in pairs}) == 1
    assert facts.items() <= sidecar["lists"].items() and sidecar["lists"]["without_pair"] == {"all scores equal": 1}


def test_references_and_measures_of_lists(call, good, files, tmp_path):
    code, err = call(PREPARE, words_of(good(PREPARE) | {"--input_csv": files["lists"]}))
    assert code == 0, err
    flags = good(EVALUATE) | {"--pairs": files["lists"], "--adapter": None, "--list_pairs": "all"}
    code, err = call(EVALUATE, words_of(flags))
    report = json.loads(Path(flags["--output_json"]).read_text())
    assert code == 0 and report["pairs"] == report["lists"]["pairs"] == 3 and "2 lists of answers make 3 pairs (all)" in err


@pytest.mark.parametrize("check", ["0", "1"])
def test_where_there_are_no_lists_the_rule_has_no_effect(call, good, files, check):
    flags = good(PREPARE) | {"--input_csv": files["pairs"], "--pairs": "all", "--min_gap": "1", "--check_data": check}
    code, err = call(PREPARE, words_of(flags))
    assert code == 0
    assert err.count(f"note: no effect: --pairs, --min_gap ({files['pairs']} has no lists of scored answers)\n") == 1
    flags = good(EVALUATE) | {"--pairs": files["pairs"], "--adapter": None, "--list_pairs": "all"}
    code, err = call(EVALUATE, words_of(flags))
    assert code == 0 and err.count("note: no effect: --list_pairs (") == 1


@pytest.mark.parametrize("form", ["lists", "thumbs"])
def test_the_data_check_counts_them(call, good, files, form):
    code, err, out = call(PREPARE, words_of({"--input_csv": files[form], "--check_data": "1", "--tokenizer": "bytes"}),
                          with_out=True)
    found = json.loads(out)
    assert code == 0, err
    if form == "thumbs":
        assert found["thumbs"] == {"up": 1, "down": 1} and "answers with a thumb: 1 up, 1 down\n" in err
        assert found["tokens"]["reject"]["min"] == found["tokens"]["chosen"]["min"] == 0
        # Shown is a thumb up, which has no rejected answer.
        assert "\nchosen │ │A│" in err and "\nreject" not in err and found["shown"]["reject"] == []
    else:
        assert found["lists"]["count"] == 2 and found["rows"] == found["lists"]["pairs"] == 1


@pytest.mark.parametrize(("form", "words"), [("thumbs", "single answers with a label"), ("lists", "lists of scored answers")])
def test_no_rejects_are_written_for_them(fails, files, form, words):
    fails(GENERATE, {"--input_csv": files[form]}, files[form], words, "rlhf_dpo_generate_save.py")


def test_what_measures_single_answers_is_told(fails, files):
    fails(EVALUATE, {"--pairs": files["thumbs"]}, "single answers with a thumb",
          "give pairs", "--eval_file of train.py --loss kto")


def test_faulty_lists_are_counted_among_the_rows(fails, call, good, tmp_path):
    path = tmp_path / "faulty.jsonl"
    faulty = [*LISTS, LISTS[0] | {"completions": [{"response": " ", "overall_score": 1}]}]
    path.write_text("\n".join(map(json.dumps, faulty)))
    fails(PREPARE, {"--input_csv": path}, "row 3: answer 1 of its completions is empty", "--skip_bad_rows 1")
    code, err = call(PREPARE, words_of(good(PREPARE) | {"--input_csv": str(path), "--skip_bad_rows": "1", "--reference": "0"}))
    assert code == 0 and "left out 1 of 3 rows, which can't be used: empty answer: row 3" in err, err


def test_a_tokenized_corpus_trains_as_its_text_does(call, good, tmp_path):
    documents = [f"The number {number} comes after {number - 1}." for number in range(1, 9)]
    (tmp_path / "text.txt").write_text("\0".join(documents))
    put(tmp_path, [[*document.encode(), 0] for document in documents])
    made = []
    for name in ("text.txt", "corpus.bin", "corpus"):
        flags = good("train") | {"--sft": "1", "--rlhf_train_file": None, "--train_data_file": str(tmp_path / name),
                                 "--eval_file": str(tmp_path / name), "--proj_dir": str(tmp_path / f"run-{name}")}
        code, err = call("train", words_of(flags))
        assert code == 0 and "8 rows make 8 texts" in err, err
        made.append([json.loads(line)["loss"] for line in (tmp_path / f"run-{name}" / "metrics.jsonl").read_text().splitlines()])
    assert made[0] == made[1] == made[2]
    # Another corpus of the same tokens is other data.
    put(tmp_path, [sum(([*document.encode(), 0] for document in documents), [])])
    code, err = call("train", words_of(flags | {"--resume": "1", "--epoch_count": "2"}))
    assert code == 2 and "corpus" in err
