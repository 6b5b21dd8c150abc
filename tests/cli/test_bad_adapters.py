"""Adapter files that are not what training writes: one line from every script that takes one."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.adapters.test_files import rewrite
from tests.cli.conftest import words_of


@pytest.mark.parametrize(("script", "flag"), [("merge", "--adapter"), ("evaluate", "--adapter"), ("train", "--load_adapter")])
@pytest.mark.parametrize(("change", "said"), [
    (lambda t: [t.pop(name) for name in list(t) if ".1." in name], "lacks blocks.1.att."),
    (lambda t: [t.pop(f"blocks.0.ffn.key.lora_{leaf}") for leaf in "AB"], "lacks blocks.0.ffn.key.lora_A"),
    (lambda t: t.clear(), "lacks blocks.0.att."),
    (lambda t: t.update({"blocks.0.ln1.weight": torch.ones(64)}), "has blocks.0.ln1.weight, which"),
    (lambda t: t.update({"emb.weight": torch.zeros(256, 64)}), "has emb.weight, which"),
    (lambda t: t.update({"blocks.0.att.key.weight": torch.zeros(64, 64)}), "has blocks.0.att.key.weight, which"),
    (lambda t: t.update({"blocks.0.att.time_state": torch.zeros(4, 16, 16)}), "has blocks.0.att.time_state, which"),
    (lambda t: t.update({"blocks.1.att.key.lora_A": torch.zeros(4, 64).char()}), "blocks.1.att.key.lora_A holds int8, expected"),
    (lambda t: t.update({"blocks.1.att.key.lora_A": torch.zeros(4)}), "blocks.1.att.key.lora_A has shape (4,), expected (4, 64)"),
])
def test_an_adapter_with_other_tensors_than_its_profile_trains(fails, adapter, tmp_path, monkeypatch, script, flag, change, said):
    path = Path(shutil.copy(adapter, tmp_path / "a.safetensors"))
    rewrite(path, change)
    monkeypatch.setattr("src.evaluation.evaluate.build_model", None)  # evaluate.py tells before any work
    fails(script, {flag: path}, path, said)


@pytest.mark.parametrize(("beta", "told"), [
    ("true", "true"), ("1e-300", "1e-300"), ("-1", "-1"), ("0", "0"), ("1e7", "10000000.0"),
    ('"0.5"', '"0.5"'), ("[0.1]", "[0.1]"), (f'"{"x" * 5000}"', '"xxx')])
def test_an_adapter_whose_beta_is_none(call, good, fails, adapter, tmp_path, monkeypatch, beta, told):
    path = Path(shutil.copy(adapter, tmp_path / "a.safetensors"))
    rewrite(path, change_metadata=lambda metadata: metadata.update(extra=f'{{"dpo_beta": {beta}}}'))
    with monkeypatch.context() as context:
        context.setattr("src.evaluation.evaluate.build_model", None)  # told before any work
        err = fails("evaluate", {"--adapter": path}, f"{path}: its dpo_beta is {told}", "not a number from 1e-06 to 1e+06")
    assert len(err) < len(str(path)) + 200
    code, err = call("evaluate", words_of(good("evaluate") | {"--adapter": str(path), "--dpo_beta": "0.25"}))
    assert code == 0 and json.loads((tmp_path / "out" / "o.json").read_text())["dpo_beta"] == 0.25, err


@pytest.mark.parametrize(("extra", "beta"), [('{"dpo_beta": 1}', 1.0), ('{"dpo_beta": 1e-6}', 1e-6), ('{"dpo_beta": null}', 0.01),
                                             ("{}", 0.01), ('{"loss": "ipo", "dpo_beta": 0.2, "kto_beta": 0.3}', 0.2),
                                             ('{"loss": "kto", "dpo_beta": 0.2, "kto_beta": 0.3}', 0.3),
                                             # Written before the losses' own flags were recorded; without a reference; of none.
                                             ('{"loss": "kto", "dpo_beta": 0.2}', 0.01),
                                             ('{"loss": "cpo", "cpo_beta": 0.3}', 0.01),
                                             ('{"loss": "sft", "dpo_beta": 0.2}', 0.01), ('{"loss": ["dpo"]}', 0.01)])
def test_the_beta_of_its_loss_is_taken_from_an_adapter(call, good, adapter, tmp_path, extra, beta):
    path = Path(shutil.copy(adapter, tmp_path / "a.safetensors"))
    rewrite(path, change_metadata=lambda metadata: metadata.update(extra=extra))
    assert call("evaluate", words_of(good("evaluate") | {"--adapter": str(path)}))[0] == 0
    assert json.loads((tmp_path / "out" / "o.json").read_text())["dpo_beta"] == beta
