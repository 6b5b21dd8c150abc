"""The preprocessing job as a whole: it goes on where it was broken off, to the very same file."""

from dataclasses import replace

import pytest
import torch

import src.preference.reference as reference
from src.errors import UserError
from src.preference.config import PrepareConfig
from src.preference.prepare import prepare


@pytest.fixture
def config(material, tmp_path) -> PrepareConfig:
    return PrepareConfig(
        load_model=str(material / "x070.pth"), input_csv=str(material / "pairs.csv"), output_save=str(tmp_path / "made.save"),
        target_pair_count=30, rlhf_max_corpus_len=512, tokenizer=None, layer_profile=None, seed=0, batch_tokens=200,
        device=torch.device("cpu"), precision="fp32", dtype=torch.float32, quantization=None)


class Plug(Exception):
    pass


def broken_off(config: PrepareConfig, after: int, monkeypatch) -> None:
    calls = 0
    answer_log_probs = reference.answer_log_probs

    def breaks(*arguments):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Plug
        return answer_log_probs(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "answer_log_probs", breaks)
        with pytest.raises(Plug):
            prepare(config)


def test_an_interrupted_run_goes_on_to_the_same_bytes(config, tmp_path, monkeypatch, capsys):
    unbroken = replace(config, output_save=str(tmp_path / "unbroken.save"))
    prepare(unbroken)
    broken_off(config, 3, monkeypatch)
    partial = tmp_path / "made.save.partial"
    assert partial.exists() and not (tmp_path / "made.save").exists()
    with partial.open("ab") as file:
        file.write(b"[3, [[-1.")  # torn off in the middle of a line
    broken_off(config, 2, monkeypatch)
    passes = []
    answer_log_probs = reference.answer_log_probs
    monkeypatch.setattr(reference, "answer_log_probs", lambda *given: passes.append(1) or answer_log_probs(*given))
    capsys.readouterr()
    prepare(config)
    assert "going on after 5 finished batches" in capsys.readouterr().err
    assert passes  # there was something left to do
    assert (tmp_path / "made.save").read_bytes() == (tmp_path / "unbroken.save").read_bytes()
    assert (tmp_path / "made.save.json").read_bytes() == (tmp_path / "unbroken.save.json").read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("changes", [{"batch_tokens": 100}, {"seed": 1}, {"precision": "bf16", "dtype": torch.bfloat16}])
def test_an_interrupted_run_of_another_kind_is_not_gone_on_with(config, monkeypatch, changes):
    broken_off(config, 2, monkeypatch)
    with pytest.raises(UserError, match=r"made.save.partial: was left by an interrupted run with another"):
        prepare(replace(config, **changes))
    prepare(config)


def test_a_damaged_partial_file_is_refused(config, tmp_path):
    (tmp_path / "made.save.partial").write_bytes(b"not of ours\n")
    with pytest.raises(UserError, match="is damaged, or no file of this script's; remove it"):
        prepare(config)
    assert (tmp_path / "made.save.partial").read_bytes() == b"not of ours\n"
