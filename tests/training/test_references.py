"""References: where a loss with them starts, what each loss makes better, and that a loss without them needs and uses none."""

import json
import math
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from tests.conftest import prepare_csv
from tests.training.outside import lines, run

pytestmark = pytest.mark.usefixtures("no_pictures")
# Flags, and the preference loss where the policy is the reference.
WITH = {"dpo": ({"dpo_beta": 0.1}, math.log(2)), "robust": ({"dpo_beta": 0.1, "label_smoothing": 0.1}, math.log(2)),
        "hinge": ({"dpo_beta": 0.1}, 1.0), "ipo": ({"dpo_beta": 0.1}, 25.0)}
WITHOUT = {"simpo": {"simpo_gamma": 0.5}, "orpo": {}, "cpo": {}}


@pytest.fixture(scope="session")
def without_references(material) -> Path:
    path = material / "no_references.save"
    prepare_csv(material / "x070.pth", material / "pairs.csv", path, reference=False)
    return path


@pytest.fixture
def flags(material):
    return {"load_model": material / "x070.pth", "accelerator": "cpu", "samples": 0, "lora_r": 4, "micro_bsz": 2}


@pytest.mark.parametrize("loss", [*WITH, *WITHOUT])
def test_each_loss_begins_where_it_must_and_makes_held_out_pairs_better(flags, prepared, without_references, tmp_path, loss):
    own, start = WITH.get(loss) or (WITHOUT[loss], None)
    save = prepared("x070") if loss in WITH else without_references
    run(tmp_path / "run", flags | own | {"rlhf_train_file": save, "eval_file": save, "loss": loss, "epoch_steps": 12,
                                         "lr_init": 5e-3, "lr_final": 5e-3})
    before, after = lines(tmp_path / "run" / "eval.jsonl")
    if loss in WITH:
        # beta times float32 sums of a hundred nats.
        assert abs(before["margin"]) < 1e-4 and before["accuracy"] == 0.5
        assert before["dpo_loss" if loss == "dpo" else "preference_loss"] == pytest.approx(start, rel=1e-4)
    else:
        assert before["margin"] != 0
    assert after["margin"] > before["margin"] and after["loss"] < before["loss"]


@pytest.mark.parametrize("loss", [*WITH, *WITHOUT])
def test_references_are_asked_for_where_they_are_used_and_nowhere_else(flags, material, without_references, tmp_path, loss):
    flags |= (WITH[loss][0] if loss in WITH else WITHOUT[loss]) | {"loss": loss, "epoch_steps": 1}
    if loss in WITH:
        with pytest.raises(UserError, match=f"made without references, which --loss {loss} needs"):
            run(tmp_path / "run", flags | {"rlhf_train_file": without_references})
        assert not (tmp_path / "run").exists()
        return
    run(tmp_path / "run", flags | {"rlhf_train_file": without_references})
    # Neither are another base's, or another precision's, any hindrance.
    prepare_csv(material / "x060.pth", material / "pairs.csv", tmp_path / "other.save", "bf16")
    run(tmp_path / "other", flags | {"rlhf_train_file": tmp_path / "other.save"})


def test_a_save_without_references_says_so(without_references):
    pairs = torch.load(without_references, weights_only=True)
    assert {tuple(pair[3:]) for pair in pairs} == {(0.0, 0.0)} and len(pairs) == 12
    sidecar = json.loads(Path(f"{without_references}.json").read_text())
    assert sidecar["references"] is False and "precision" not in sidecar


def test_references_do_not_change_a_reference_free_run(flags, prepared, without_references, tmp_path):
    one, other = (run(tmp_path / name, flags | {"rlhf_train_file": save, "loss": "simpo", "epoch_steps": 4, "lr_init": 1e-3})[1]
                  for name, save in (("one", prepared("x070")), ("other", without_references)))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
