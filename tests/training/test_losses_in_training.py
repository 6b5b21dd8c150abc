"""Every loss on a real model and in a whole run: the objective's value, what is logged, and what needs references."""

import json
import math
from pathlib import Path

import pytest
import torch

from src.adapters.files import read_adapter
from src.data.packing import pack_pairs
from src.errors import UserError
from src.evaluation.held_out import evaluate_pairs
from src.preference.loss import LOSSES, needs_reference
from src.preference.objective import Objective, pair_losses
from src.preference.pairs import load_pairs
from src.training.config import objective_of
from src.training.run import train
from tests.conftest import prepare_csv
from tests.preference.test_losses import SETTINGS, formula
from tests.preference.test_objective import policy


@pytest.fixture(scope="session")
def without_references(material) -> Path:
    path = material / "no_references.save"
    prepare_csv(material / "x070.pth", material / "pairs.csv", path, reference=False)
    return path


@pytest.mark.parametrize(("loss", "beta", "gamma", "smoothing"), SETTINGS)
@pytest.mark.parametrize("sft_on_prompt", [False, True])
def test_the_objective_on_a_model_is_the_formula_in_float64(material, prepared, loss, beta, gamma, smoothing, sft_on_prompt):
    pairs = load_pairs(prepared("x070"), 256, 512)[0][:4]
    # References some nats off, so that margins are not 0.
    pairs = [(*pair[:3], pair[3] - 3.0 + number, pair[4] + number) for number, pair in enumerate(pairs)]
    exact, _ = policy(material / "x070.pth", torch.float64)

    def log_probs(prompt, answer):
        tokens = torch.tensor(prompt + answer)
        every = torch.log_softmax(exact.logits(exact(tokens[:-1])[0]), -1)[torch.arange(len(tokens) - 1), tokens[1:]]
        return every[len(prompt) - 1:].sum().item(), every[:len(prompt) - 1].sum().item()

    model, _ = policy(material / "x070.pth", torch.float32)
    objective = Objective(beta, 0.3, sft_on_prompt, loss, gamma, smoothing)
    found = pair_losses(model, pack_pairs(pairs), [pair[3:] for pair in pairs], objective)
    for number, (prompt, chosen, reject, *references) in enumerate(pairs):
        (c, c_prompt), (r, _) = log_probs(prompt, chosen), log_probs(prompt, reject)
        preference = formula(loss, c, r, *references, len(chosen), len(reject), beta, gamma, smoothing)
        nll = -(c + c_prompt) / (len(prompt) - 1 + len(chosen)) if sft_on_prompt else -c / len(chosen)
        # Float32 sums of a hundred nats, times beta.
        assert found[objective.loss_name][number].item() == pytest.approx(preference, rel=1e-4, abs=1e-5)
        assert found["loss"][number].item() == pytest.approx(preference + 0.3 * nll, rel=1e-4)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_run_of_each_loss(config, prepared, without_references, loss):
    free = not needs_reference(loss)
    save = str(without_references if free else prepared("x070"))
    run = config(rlhf_train_file=save, eval_file=save, loss=loss, epoch_count=2, epoch_steps=6, dpo_beta=0.1, simpo_gamma=0.5,
                 lr_init=5e-3, lr_final=5e-3, label_smoothing=0.1 if loss == "robust" else 0.0)
    train(run, {})
    folder = Path(run.run.proj_dir)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    objective = objective_of(run.objective)
    name = "dpo_loss" if loss == "dpo" else "preference_loss"
    for line in metrics + held_out:
        assert line["loss"] == pytest.approx(line[name] + objective.alpha * line["sft_loss"], rel=1e-5)
        assert line["margin"] == pytest.approx(line["reward_chosen"] - line["reward_rejected"], abs=1e-5)
        assert "dpo_loss" not in line or loss == "dpo"
    assert held_out[-1]["margin"] > held_out[0]["margin"] and held_out[-1]["loss"] < held_out[0]["loss"]
    if free:
        assert held_out[0]["margin"] != 0
    else:
        assert abs(held_out[0]["margin"]) < 1e-4 and held_out[0]["accuracy"] == 0.5
    assert read_adapter(folder / "rwkv-final.safetensors").extra["loss"] == loss and (folder / "curves.png").exists()


def test_at_the_start_the_losses_on_dpos_margin_are_known(material, prepared):
    pairs, _, _ = load_pairs(prepared("x070"), 256, 512)
    model, _ = policy(material / "x070.pth", torch.float32)
    for loss, value in (("dpo", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)):
        objective = Objective(0.1, 0.0, loss=loss, label_smoothing=0.1 if loss == "robust" else 0.0)
        assert evaluate_pairs(model, pairs, objective)["loss"] == pytest.approx(value, rel=1e-4), loss


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_references_are_asked_for_where_they_are_used_and_nowhere_else(config, material, without_references, tmp_path, loss):
    run = config(rlhf_train_file=str(without_references), loss=loss, epoch_count=1, epoch_steps=1, label_smoothing=0.1)
    if needs_reference(loss):
        with pytest.raises(UserError, match=f"made without references, which --loss {loss} needs"):
            train(run, {})
        assert not Path(run.run.proj_dir).exists()
        return
    train(run, {})
    # Neither are another base's, or another precision's, any hindrance.
    prepare_csv(material / "x060.pth", material / "pairs.csv", tmp_path / "other.save", "bf16")
    train(config(rlhf_train_file=str(tmp_path / "other.save"), loss=loss, epoch_count=1, epoch_steps=1, label_smoothing=0.1,
                 proj_dir=str(tmp_path / "other")), {})


def test_a_save_without_references_says_so(without_references):
    pairs, sidecar, _ = load_pairs(without_references, 256, 512)
    assert {pair[3:] for pair in pairs} == {(0.0, 0.0)} and len(pairs) == 12
    assert sidecar["references"] is False and "precision" not in sidecar


def test_references_do_not_change_a_reference_free_run(config, prepared, without_references, tmp_path):
    for name, save in (("one", prepared("x070")), ("other", without_references)):
        train(config(rlhf_train_file=str(save), loss="simpo", epoch_count=1, proj_dir=str(tmp_path / name)), {})
    one, other = (read_adapter(tmp_path / name / "rwkv-final.safetensors").weights for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
