"""evaluate.py against what training itself says of the same pairs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluate import main
from src.adapters.files import merge_adapter
from src.checkpoint.base import load_base
from src.checkpoint.io import save_checkpoint
from tests.cli.conftest import words_of
from tests.conftest import prepare_csv


@pytest.fixture
def evaluated(call, good, capsys):
    """`evaluated({flag: value})` -> the JSON of a run that went well, and what stderr said."""

    def evaluated(changes: dict) -> tuple[dict, str]:
        flags = good("evaluate") | {flag: value if value is None else str(value) for flag, value in changes.items()}
        code, err = call("evaluate", words_of(flags))
        assert code == 0, err
        return json.loads(Path(flags["--output_json"]).read_text()), err

    return evaluated


def test_the_held_out_numbers_of_training_come_out_again(evaluated, call, good, material, prepared, tmp_path):
    flags = good("train") | {"--proj_dir": str(tmp_path / "run"), "--eval_file": str(prepared("x070")), "--dpo_beta": "0.2",
                             "--lr_init": "1e-2", "--epoch_steps": "8"}
    assert call("train", words_of(flags))[0] == 0
    before, after = map(json.loads, (tmp_path / "run" / "eval.jsonl").read_text().splitlines())
    found, err = evaluated({"--adapter": tmp_path / "run" / "rwkv-final.safetensors"})
    assert err == "" and found["dpo_beta"] == 0.2 and found["references"] == "cached, of x070.pth"
    assert found["references_of_this_model"] is True and found["left_out"] == 0
    assert abs(after["margin"]) > 0.01
    for name in ("accuracy", "margin", "reward_chosen", "reward_rejected"):
        # Batches of another make-up, so float32 sums of a hundred nats in another order, times beta.
        assert found[name] == pytest.approx(after[name], abs=1e-5)
    assert found["nats_per_token_chosen"] == pytest.approx(after["sft_loss"], rel=1e-5)
    # The base alone is the reference: margin 0, every pair a tie.
    found, _ = evaluated({"--adapter": None})
    assert found["accuracy"] == before["accuracy"] == 0.5 and abs(found["margin"]) < 1e-5 and found["dpo_beta"] == 0.01


def test_adapter_merged_model_and_csv_say_the_same(evaluated, adapter, material, prepared, tmp_path):
    cached, _ = evaluated({})
    base, _ = load_base(material / "x070.pth")
    save_checkpoint(merge_adapter(base, adapter), tmp_path / "merged.pth")
    merged, err = evaluated({"--load_model": tmp_path / "merged.pth", "--adapter": None})
    assert err == "" and merged["references_of_this_model"] is False
    csv, _ = evaluated({"--pairs": material / "pairs.csv"})
    assert csv["references"] == str(material / "x070.pth")
    both, _ = evaluated({"--pairs": material / "pairs.csv", "--load_model": tmp_path / "merged.pth", "--adapter": None,
                         "--reference_model": material / "x070.pth"})
    for found in (merged, csv, both):
        assert found["pairs"] == cached["pairs"] == 12
        for name in ("margin", "reward_chosen", "log_prob_chosen", "log_prob_reject", "tokens_chosen"):
            assert found[name] == pytest.approx(cached[name], abs=1e-4), name


def test_without_references_there_are_no_margins(evaluated, call, good, material, tmp_path):
    found, _ = evaluated({"--pairs": material / "pairs.csv", "--adapter": None})
    assert found["accuracy"] is None and found["references"] is None and 0 <= found["policy_accuracy"] <= 1
    flags = good("rlhf_dpo_generate_save") | {"--reference": "0", "--output_save": str(tmp_path / "none.SAVE")}
    assert call("rlhf_dpo_generate_save", words_of(flags))[0] == 0
    again, _ = evaluated({"--pairs": tmp_path / "none.SAVE", "--adapter": None})
    assert again["accuracy"] is None and again["log_prob_chosen"] == found["log_prob_chosen"]
    measured, _ = evaluated({"--pairs": tmp_path / "none.SAVE"})
    assert measured["references"] == str(material / "x070.pth") and measured["margin"] is not None


def test_a_quantized_base_as_in_training(evaluated, prepared, material):
    found, err = evaluated({"--strategy": "cpu fp32nf4", "--pairs": prepared("x070", "fp32", "nf4"), "--adapter": None})
    assert err == "" and found["quantization"] == "nf4" and abs(found["margin"]) < 1e-5
    _, err = evaluated({"--strategy": "cpu fp32nf4"})
    assert err.startswith("warning: ") and "quantization: none for the references, nf4 here" in err


def test_the_table_tells_the_numbers(call, good, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()
    main(words_of(good("evaluate")))
    out = capsys.readouterr().out
    for words in ("preference accuracy", "mean margin, beta 0.01", "12 pairs", "chosen longer", "correlation with length",
                  "cached, of x070.pth", "mean length"):
        assert words in out


def test_flags_that_are_wrong(fails, material, prepared, tmp_path):
    fails("evaluate", {"--dpo_beta": 0}, "--dpo_beta")
    fails("evaluate", {"--reference_model": material / "x070.pth"}, "--reference_model", "references of its own")
    (tmp_path / "pairs.csv").write_text("prompt,chosen\na,b\n")
    fails("evaluate", {"--pairs": tmp_path / "pairs.csv"}, "row 1 has no reject")
    fails("evaluate", {"--pairs": material / "pairs.csv", "--reference_model": tmp_path / "no.pth"}, "no.pth", "does not exist")


def test_length_bias_of_real_log_probs_is_numpys(evaluated, prepared):
    found, _ = evaluated({"--adapter": None})
    pairs = torch.load(prepared("x070"), weights_only=True)
    longer = [len(chosen) - len(reject) for _, chosen, reject, _, _ in pairs]
    difference = [chosen - reject for *_, chosen, reject in pairs]
    assert found["length_correlation"]["log_prob_difference"] == pytest.approx(np.corrcoef(difference, longer)[0, 1], abs=1e-4)


def test_preparing_without_references_says_so(material, tmp_path):
    prepare_csv(material / "x070.pth", material / "pairs.csv", tmp_path / "with.save")
    assert json.loads((tmp_path / "with.save.json").read_text())["references"] is True


def test_single_answers_are_left_out_and_a_file_of_them_alone_is_refused(evaluated, fails, prepared, material, tmp_path):
    prepare_csv(material / "x070.pth", material / "pairs.csv", tmp_path / "thumbs.save", unpair=True)
    fails("evaluate", {"--pairs": tmp_path / "thumbs.save"}, "24 have an empty answer", "train with --loss kto")
    pairs = torch.load(prepared("x070"), weights_only=True)
    torch.save(pairs + torch.load(tmp_path / "thumbs.save", weights_only=True), tmp_path / "mixed.save")
    found, _ = evaluated({"--pairs": tmp_path / "mixed.save"})
    assert (found["pairs"], found["left_out"]) == (12, 24)


def test_margins_are_of_the_beta_that_the_adapters_loss_used(evaluated, call, good, prepared, material, tmp_path):
    prepare_csv(material / "x070.pth", material / "pairs.csv", tmp_path / "thumbs.save", unpair=True)
    flags = good("train") | {"--rlhf_train_file": str(tmp_path / "thumbs.save"), "--loss": "kto", "--kto_beta": "0.3"}
    assert call("train", words_of(flags))[0] == 0
    found, _ = evaluated({"--adapter": tmp_path / "out" / "run" / "rwkv-final.safetensors"})
    assert found["dpo_beta"] == 0.3
    found, _ = evaluated({"--adapter": tmp_path / "out" / "run" / "rwkv-final.safetensors", "--dpo_beta": "0.5"})
    assert found["dpo_beta"] == 0.5
