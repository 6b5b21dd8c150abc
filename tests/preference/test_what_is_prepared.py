"""What a preparation makes of a file and says about it, and what it refuses before it makes anything."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.checkpoint.base import load_base_and_fingerprint
from src.data.faults import Reading
from src.data.rows import Row
from src.data.templates import CLASSIC
from src.data.token_lists import TokenPair
from src.errors import UserError
from src.preference.config import PrepareConfig
from src.preference.pairs import load_pairs
from src.preference.prepare import _digest, prepare
from src.quantization.strategy import Strategy
from tests.pairs_csv import write_pairs_csv
from tests.stored_pairs import stored_tokens
from tests.tokenizer.files import KINDS, saved

CPU = torch.device("cpu")


@pytest.fixture
def mixed(material, tmp_path) -> PrepareConfig:
    """Of four rows one has no chosen answer, one a prompt and one an answer beyond the limit of 64 tokens."""
    rows = [Row("What is 1 plus 1?", "It is 2.", "No idea."), Row("Why? " * 20, "So.", "No."), Row("Why?", "", "No."),
            Row("Why?", "So.", "No. " * 20)]
    write_pairs_csv(tmp_path / "mixed.csv", rows)
    return PrepareConfig(load_model=str(material / "x070.pth"), input_csv=str(tmp_path / "mixed.csv"), skip_bad_rows=True,
                         output_save=str(tmp_path / "made.save"), rlhf_max_corpus_len=64, strategy=Strategy(CPU, "fp32", None))


@pytest.mark.parametrize("references", [True, False])
def test_the_sidecar_and_a_summary_tell_what_was_made(mixed, tmp_path, capsys, references):
    prepare(replace(mixed, reference=references), ["a line about the command"])
    said = capsys.readouterr().err
    made = torch.load(mixed.output_save, weights_only=True)
    sidecar = json.loads((tmp_path / "made.save.json").read_text())
    templates = sidecar.pop("templates")
    how = {"precision": "fp32", "quantization": None, "unquantized_blocks": [], "quantized_otherwise": {}}
    assert sidecar == {
        "base_model": "x070.pth", "base_fingerprint": load_base_and_fingerprint(mixed.load_model)[2], "version": "x070",
        "tokenizer": "bytes", "seed": 0, "loss_on": "all", "template": {
            "name": "classic", "fingerprint": CLASSIC.fingerprint, "stops": ["\n\n"], "controls": [], "opening": "",
            "collapses": True},
        "max_len": 64, "cut": 1, "dropped": 1, "changed_texts": 0,
        "skipped_rows": {"count": 1, "rows": {"empty chosen answer": [3]}}, "references": references,
        **(how if references else {}), "count": 2, "sha256": hashlib.sha256((tmp_path / "made.save").read_bytes()).hexdigest()}
    answers = [tuple(bytes(tokens).decode() for tokens in pair[1:3]) for pair in made]
    assert answers == [(" It is 2.\n\n", " No idea.\n\n"), (" So.\n\n", " No.\n\n")] and sum(templates.values()) == 2
    assert all(value < 0 if references else value == 0.0 for pair in made for value in pair[3:])
    assert "a line about the command" in said and "left out 1 of 4 rows" in said and "resuming" not in said
    summary = re.search(r"made.save: 2 pairs from 3 rows in ([0-9.]+) s; 1 prompts cut and 1 pairs dropped at 64 tokens", said)
    assert summary and float(summary[1]) < 600
    assert all(f"{name} {count}" in said for name, count in templates.items())


def test_texts_that_a_tokenizer_changes_are_told_and_counted(mixed, tmp_path, capsys):
    write_pairs_csv(mixed.input_csv, [Row("the cat", "sat é", "mat")])
    prepare(replace(mixed, tokenizer=saved(KINDS["Prepend without bytes"](), tmp_path), reference=False))
    assert "1 of 3 texts do not come back" in capsys.readouterr().err
    assert json.loads((tmp_path / "made.save.json").read_text())["changed_texts"] == 1


def test_a_row_that_can_t_be_used_is_refused_unless_asked(mixed, tmp_path):
    with pytest.raises(UserError, match="row 3 has an empty chosen answer"):
        prepare(replace(mixed, skip_bad_rows=False))
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.csv"]


def test_a_file_without_rejected_answers_is_refused(mixed, tmp_path):
    write_pairs_csv(mixed.input_csv, [Row("Why?", "So.", "")])
    for check in (False, True):
        with pytest.raises(UserError, match="reject"):
            prepare(replace(mixed, check_data=check, skip_bad_rows=False))


def test_weights_that_will_train_in_full_are_not_quantized_for_the_references(mixed, tmp_path):
    """With all in mode full nothing is quantized, so references are those of the plain model."""
    (tmp_path / "full.csv").write_text("Layer,Mode,Weight_lr_init,Weight_lr_final\n" + "".join(
        f"{layer},full,0.001,0.001\n" for layer in ("emb", "0", "1", "head")))
    found = {}
    full = str(tmp_path / "full.csv")
    for name, scheme, profile in (("plain", None, "auto"), ("full", "int8", full), ("int8", "int8", "auto")):
        prepare(replace(mixed, output_save=str(tmp_path / name), layer_profile=profile,
                        strategy=Strategy(CPU, "fp32", scheme)))
        found[name] = [value for pair in torch.load(tmp_path / name, weights_only=True) for value in pair[3:]]
    assert found["full"] == found["plain"] and found["int8"] != pytest.approx(found["plain"], abs=1e-3)
    assert json.loads((tmp_path / "full.json").read_text())["unquantized_blocks"] == [0, 1]


@pytest.mark.parametrize("other", ["made.save", "made.save.json", "made.save.partial"])
def test_no_input_is_overwritten(mixed, tmp_path, other):
    (tmp_path / other).write_bytes(b"prompt,chosen,reject\nWhy?,So.,No.\n")
    with pytest.raises(UserError, match=f"{other}: is also the file of --input_csv"):
        prepare(replace(mixed, input_csv=str(tmp_path / other)))
    assert (tmp_path / other).read_bytes().startswith(b"prompt")


def test_somebody_s_file_beside_the_output_is_not_overwritten(mixed, tmp_path):
    (tmp_path / "made.save.json").write_text('{"my": "dataset"}')
    with pytest.raises(UserError, match="is no sidecar"):
        prepare(mixed)
    assert (tmp_path / "made.save.json").read_text() == '{"my": "dataset"}' and not (tmp_path / "made.save").exists()


def test_a_check_reports_on_the_rows_and_writes_nothing(mixed, tmp_path, capsys):
    check = replace(mixed, check_data=True, output_save=None, seed=3)
    prepare(check, ["a line about the command"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["rows"], found["tokenizer"], found["cut_at"], found["dropped_at"]) == (3, "bytes", [2], [4])
    assert "a line about the command" in err and "can't be used, empty chosen answer" in err
    with pytest.raises(UserError, match="row 3 has an empty chosen answer"):
        prepare(replace(check, skip_bad_rows=False))
    assert json.loads(capsys.readouterr().out) == found  # the report comes all the same
    prepare(replace(check, load_model=None, tokenizer="bytes"))
    assert json.loads(capsys.readouterr().out) == found
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.csv"]


def test_a_check_of_good_rows_or_of_none(mixed, capsys):
    check = replace(mixed, check_data=True, skip_bad_rows=False)
    (csv := Path(mixed.input_csv)).write_text("prompt,chosen,reject,mood\nWhy?,So.,No.,calm\n")
    prepare(check)
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == 1 and "mood" in err
    csv.write_text("prompt,chosen,reject\nWhy?,,No.\n")
    for skip in (False, True):
        with pytest.raises(UserError, match="none of its 1 rows can be used"):
            prepare(replace(check, skip_bad_rows=skip))


def test_a_journal_s_digest_is_of_the_settings_and_all_tokens():
    pairs = [([1, 2], [3], [4, 5]), ([1, 2], [6], []), ([], [3], [4, 5])]
    others = [pairs[:2], [pairs[1], pairs[0], pairs[2]], [([1], [2, 3], [4, 5]), *pairs[1:]], [([1, 2], [7], [4, 5]), *pairs[1:]],
              [(*pairs[0], 0, 1), *pairs[1:]], [(*pairs[0], 1, 0), *pairs[1:]]]
    found = [_digest(settings, stored_tokens([TokenPair(*pair) for pair in some])) for settings, some in (
        *(([*base, None], pairs) for base in (["base"], ["base"], [None], [])), *((["base", None], some) for some in others))]
    assert found[0] == found[1] and len(set(found)) == len(found) - 1


@pytest.fixture
def thumbs(mixed, tmp_path, monkeypatch):
    """`thumbs(rows, **flags)` -> the entries of the file that is made of these rows."""
    def made(rows: list[Row], **flags) -> list[tuple]:
        reading = Reading(Path(mixed.input_csv), rows, list(range(1, len(rows) + 1)), [], [])
        monkeypatch.setattr("src.preference.prepare.read_pairs", lambda *_, **__: reading)
        prepare(replace(mixed, **flags))
        return torch.load(tmp_path / "made.save", weights_only=True)

    return made


def text(tokens) -> str:
    return bytes(tokens).decode()


def test_single_answers_get_one_to_another_prompt_to_be_seen_with(thumbs, mixed, tmp_path, capsys):
    asked = ["Why?", "Why?", "How?", "What?"]
    rows = [Row(asked[0], "So.", ""), Row(asked[1], "", "No."), Row(asked[2], "", "Some way or other. " * 2),
            Row(asked[3], "That.", "")]
    content = thumbs(rows)
    assert "made.save: 2 thumbs up and 2 thumbs down from 4 rows" in capsys.readouterr().err
    pairs, _, left_out = load_pairs(tmp_path / "made.save", 256, 64, thumbs=True)
    assert len(pairs) == len(content) == 4 and not any(left_out.values())
    of = [" So.\n\n", " No.\n\n", " Some way or other. Some way or other.\n\n", " That.\n\n"]
    for row, pair, own in zip(rows, pairs, of, strict=True):
        assert (text(pair.chosen), text(pair.reject)) == ((own, "") if row.chosen else ("", own))
        others = [answer for other, answer in zip(rows, of, strict=True) if other.prompt != row.prompt]
        room = 64 - len(pair.prompt)
        assert text(pair.kl) in [answer[:room] for answer in others] and pair.kl_base_prob < -1.0
    assert sorted(text(pair.kl)[:5] for pair in pairs) == sorted(answer[:5] for answer in of)


def test_a_row_s_answers_are_never_seen_with_its_own_prompt_in_another_template(thumbs):
    rows = [Row("Why?", "So.", "No."), Row("How?", "This way.", "That way."), Row("What?", "A thing.", "None.")]
    content = thumbs(rows, unpair=True, target_pair_count=40)
    assert len(content) == 80 and len({tuple(prompt) for prompt, *_ in content}) > 3
    answers = {row.prompt: {f" {row.chosen}\n\n", f" {row.reject}\n\n"} for row in rows}
    for at, (prompt, chosen, reject, *_, more) in enumerate(content):
        assert bool(chosen) != bool(reject) and bool(chosen) == (at % 2 == 0)
        asked, = (asked for asked in answers if asked in text(prompt))
        assert text(chosen or reject) in answers[asked] and text(more["kl"]) not in answers[asked]


def test_the_seed_says_which_answers_are_seen_with_which_prompts(thumbs):
    rows = [Row(f"Why {number}?", f"So {number}.", "") for number in range(12)]
    drawn = [[text(more["kl"]) for *_, more in thumbs(rows, seed=seed, reference=seed < 2)] for seed in (0, 1, 0, 2)]
    assert drawn[0] == drawn[2] and len(set(map(tuple, drawn))) == 3


def test_pairs_stay_pairs_beside_single_answers(thumbs, capsys):
    rows = [Row("Why?", "So.", "No."), Row("How?", "This way.", ""), Row("What?", "", "None.")]
    content = thumbs(rows)
    assert [len(entry) for entry in content] == [5, 6, 6]
    assert "1 pairs and 1 thumbs up and 1 thumbs down from 3 rows" in capsys.readouterr().err
    assert [len(entry) for entry in thumbs(rows, unpair=True)] == [6] * 4


def test_single_answers_to_one_prompt_alone_are_refused(thumbs, mixed):
    with pytest.raises(UserError, match="mixed.csv: all of its single answers are to one prompt"):
        thumbs([Row("Why?", "So.", ""), Row("Why?", "", "No."), Row("How?", "This way.", "That way.")])
    assert not Path(mixed.output_save).exists()
