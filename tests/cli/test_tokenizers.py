"""A Hugging Face tokenizer whose vocabulary lacks letters: every script that reads texts says so, in one line, and goes on."""

import json

import pytest
import torch

from src.data.rows import Row
from tests.cli.conftest import words_of
from tests.pairs_csv import write_pairs_csv
from tests.tokenizer.files import KINDS, saved

ROWS = [Row("the cat", "sat", "mat"), Row("the 你", "sat é", "mat"), Row("the cat", "好", "mat")]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "out").mkdir()
    return {"--tokenizer": saved(KINDS["Prepend without bytes"](), tmp_path)}


@pytest.fixture
def csv(tmp_path):
    write_pairs_csv(tmp_path / "pairs.csv", ROWS)
    return str(tmp_path / "pairs.csv")


def told(err: str, count: int, of: int, first: str) -> bool:
    lines = [line for line in err.splitlines() if "do not come back" in line]
    return len(lines) == 1 and f"pairs.csv: {count} of {of} texts" in lines[0] and first in lines[0]


def test_preparing_and_its_check(call, good, tokenizer, csv, tmp_path, capsys):
    flags = good("rlhf_dpo_generate_save") | tokenizer | {"--input_csv": csv, "--target_pair_count": "20"}
    code, err = call("rlhf_dpo_generate_save", words_of(flags))
    assert code == 0 and told(err, 3, 9, "row 2's chosen, which loses 'é'") and "'你'" in err and "'好'" in err
    assert json.loads((tmp_path / "out" / "o.save.json").read_text())["changed_texts"] == 3
    code, err = call("rlhf_dpo_generate_save", words_of(tokenizer | {"--input_csv": csv, "--check_data": "1"}))
    assert code == 0 and told(err, 3, 9, "row 2's chosen")


def test_the_check_s_json(tokenizer, csv, capsys):
    import rlhf_dpo_generate_save as script

    script.main(words_of(tokenizer | {"--input_csv": csv, "--check_data": "1"}))
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert (changes["looked_at"], changes["texts"], changes["rows"]) == (9, 3, [2, 3]) and set(changes["lost"]) == set("你é好")


def test_evaluating_writing_and_sft(call, good, tokenizer, csv, tmp_path):
    code, err = call("evaluate", words_of(good("evaluate") | tokenizer | {"--pairs": csv}))
    assert code == 0 and told(err, 3, 9, "row 2's chosen")
    assert json.loads((tmp_path / "out" / "o.json").read_text())["changed_texts"] == 3
    code, err = call("rlhf_generate_reject_csv", words_of(good("rlhf_generate_reject_csv") | tokenizer | {"--input_csv": csv}))
    assert code == 0 and told(err, 1, 3, "row 2's prompt, which loses '你'")
    flags = good("train") | tokenizer | {"--rlhf_train_file": None, "--sft": "1", "--train_data_file": csv, "--samples": "0"}
    code, err = call("train", words_of(flags))
    assert code == 0 and told(err, 3, 6, "row 2's answer (part 2), which loses 'é'")
    assert json.loads((tmp_path / "out" / "run" / "config.json").read_text())["train_data"]["changes"]["texts"] == 3


@pytest.mark.parametrize("name", ["bytes", "ByteLevel"])
def test_where_nothing_is_lost_nothing_is_said(call, good, csv, tmp_path, name):
    tokenizer = name if name == "bytes" else saved(KINDS[name](), tmp_path)
    code, err = call("rlhf_dpo_generate_save", ["--tokenizer", tokenizer, "--input_csv", csv, "--check_data", "1"])
    assert code == 0 and "do not come back" not in err


def test_truncation_and_padding_of_the_file_change_no_pair(call, good, csv, tmp_path):
    (tmp_path / "out").mkdir()
    library, made = KINDS["Prepend without bytes"](), []
    for kept in (False, True):
        if kept:
            library.enable_truncation(4)
            library.enable_padding(length=32)
        flags = good("rlhf_dpo_generate_save") | {"--input_csv": csv, "--tokenizer": saved(library, tmp_path), "--reference": "0"}
        assert call("rlhf_dpo_generate_save", words_of(flags))[0] == 0
        made.append(torch.load(tmp_path / "out" / "o.save", weights_only=True))
    assert made[0] == made[1] and max(len(prompt) for prompt, *_ in made[0]) > 4
