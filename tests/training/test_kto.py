"""train.py --loss kto: every optimizer step against the same step by hand in float64, however it is split; what is said and
refused; held-out numbers, the report, and a resume."""

import functools
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.generation.greedy import likeliest_answers
from src.training.run import train
from tests.conftest import prepare_csv
from tests.settings import changed
from tests.training.exact import Exact, Watched
from tests.training.outside import lines
from tests.training.plain_thumbs import BETA, DOWN, FLAGS, UP, Thumb, save_thumbs, step_of
from tests.training.test_accumulation import CLOSE
from tests.training.test_run import numbers, stop_in_the_second_epoch

# Weights stay as they are, so that one oracle holds for all steps; every parameter of the blocks trains.
STILL = FLAGS | dict(peft="full", lr_init=1e-9, lr_final=1e-10, warmup_steps=0, gradient_clip_val=0.0, epoch_steps=0,
                     epoch_count=1)
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def exact(material):
    return functools.cache(lambda version: Exact(material / f"{version}.pth"))


@pytest.fixture(scope="module")
def five(exact, tmp_path_factory):
    """`five(version)` -> a file of five thumbs, and each one's numbers by its prompt."""
    folder = tmp_path_factory.mktemp("thumbs")

    @functools.cache
    def made(version: str) -> tuple[Path, dict[tuple, Thumb]]:
        thumbs = save_thumbs(exact(version), folder / f"{version}.save", 5)
        return folder / f"{version}.save", {tuple(thumb[0]): Thumb(exact(version), thumb) for thumb in thumbs}

    return made


def check(watched: Watched, run, by_prompt: dict[tuple, Thumb], sizes: list[int]) -> None:
    told = lines(Path(run.run.proj_dir) / "metrics.jsonl")
    assert [len(step) for step in watched.steps] == sizes and len(told) == len(sizes)
    for gradient, pairs, line in zip(watched.gradients, watched.steps, told, strict=True):
        expected, right = step_of([by_prompt[tuple(pair.prompt)] for pair in pairs])
        assert (gradient - right).norm() < CLOSE * right.norm()
        assert expected.keys() <= line.keys() and ("margin" in line) == ("margin" in expected)
        assert line == pytest.approx(line | expected, rel=CLOSE, abs=1e-5)
        assert expected["kl"] > 0


@pytest.mark.parametrize(("version", "changes", "sizes"), [
    ("x070", dict(micro_bsz=5), [5]),
    ("x060", dict(micro_bsz=5, grad_cp=True), [5]),
    ("x070", dict(micro_bsz=1, accumulate_grad_batches=5), [5]),
    ("x070", dict(micro_bsz=1, accumulate_grad_batches=4, epoch_count=2), [4, 1, 4, 1]),
    ("x060", dict(micro_bsz=2, accumulate_grad_batches=2, epoch_steps=3, epoch_count=2), [4, 2, 4, 2]),
    ("x070", dict(micro_bsz=4, accumulate_grad_batches=2), [5]),
    ("x070", dict(batch_tokens=40, accumulate_grad_batches=2, epoch_count=2), [4, 1, 3, 2]),
], ids=["whole", "whole, v6", "accumulated", "left over", "across passes", "unequal", "by tokens"])
def test_every_step_is_of_all_its_thumbs_and_their_kl(config, five, exact, version, changes, sizes):
    path, by_prompt = five(version)
    run = config(version, rlhf_train_file=str(path), **STILL | changes)
    check(Watched(run, exact(version).parameters), run, by_prompt, sizes)


def test_a_resumed_run_goes_on_with_the_same_steps(config, five, tmp_path, monkeypatch):
    path, _ = five("x070")
    run = config(rlhf_train_file=str(path), **FLAGS | dict(micro_bsz=1, accumulate_grad_batches=3, epoch_steps=5, epoch_count=3))
    train(run, {})
    broken = changed(run, proj_dir=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr("src.training.saving.SaveAdapters.on_train_batch_end", stop_in_the_second_epoch, raising=False)
        with pytest.raises(ConnectionError):
            train(broken, {})
    train(changed(broken, resume=True), {})
    assert numbers(tmp_path / "broken" / "metrics.jsonl") == numbers(Path(run.run.proj_dir) / "metrics.jsonl")


def test_held_out_numbers_are_of_the_kl_of_all_and_the_page_shows_them(config, five, monkeypatch, capsys):
    path, by_prompt = five("x070")
    flags = STILL | dict(micro_bsz=2, accumulate_grad_batches=4, samples=2)
    run = config(rlhf_train_file=str(path), eval_file=str(path), **flags)
    monkeypatch.setattr("src.evaluation.held_out.BATCH_TOKENS", 40)
    train(run, {}, likeliest_answers)
    expected, _ = step_of(list(by_prompt.values()))
    del expected["grad_norm"]
    expected["accuracy"] = expected.pop("pref_accuracy")
    for line in lines(Path(run.run.proj_dir) / "eval.jsonl"):
        assert line.keys() == {"step", "pairs", *expected} and line["pairs"] == 5
        assert line == pytest.approx(line | expected, rel=CLOSE, abs=1e-5)
    said = capsys.readouterr().err
    assert "5 thumbs, 1 optimizer steps" in said and "held out: accuracy" in said and " pref " in said
    page = (Path(run.run.proj_dir) / "report.html").read_text()
    assert "3 thumbs up and 2 down" in page and "KTO" in page and "DPO" not in page and "KL to the base" in page


def test_what_kto_asks_of_its_data_is_said_once(config, five, capsys):
    path, _ = five("x070")
    flags = FLAGS | {"kto_desirable_weight": 1.0, "kto_undesirable_weight": 1.0, "epoch_steps": 2, "epoch_count": 1,
                     "warmup_steps": 0}
    train(config(rlhf_train_file=str(path), **flags | {"micro_bsz": 1}), {})
    _, of_balance, of_steps = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:"))
    assert "3 thumbs up and 2 down, weighted 1.5:1" in of_balance and "--accumulate_grad_batches, such as 8" in of_steps
    run = config(rlhf_train_file=str(path), proj_dir=str(path.parent / "more"), **flags | {"micro_bsz": 2, "epoch_steps": 1,
                                                                                         "kto_undesirable_weight": 1.3})
    train(run, {})
    assert "KTO" not in capsys.readouterr().err


def test_pairs_are_refused_with_the_flag_that_makes_thumbs_of_them(config, prepared):
    with pytest.raises(UserError, match=r"12 of its 12 pairs have two answers, .*rlhf_dpo_generate_save.py with --unpair 1"):
        train(config(loss="kto"), {})


def test_thumbs_without_a_mismatched_answer_are_refused(config, tmp_path):
    torch.save([([1], [2], [], -1.0, 0.0), ([3], [], [4], 0.0, -1.0, {"kl": [5], "kl_base_prob": -2.0})], tmp_path / "old.save")
    with pytest.raises(UserError, match="1 of its 2 thumbs have no mismatched answer .* again"):
        train(config(loss="kto", rlhf_train_file=str(tmp_path / "old.save")), {})


def test_other_losses_leave_thumbs_out(config, five, prepared, tmp_path, capsys):
    path, _ = five("x070")
    with pytest.raises(UserError, match="5 have an empty answer .*train with --loss kto"):
        train(config(rlhf_train_file=str(path)), {})
    pairs = torch.load(prepared("x070"), weights_only=True)
    torch.save([*pairs, *torch.load(path, weights_only=True)], tmp_path / "mixed.save")
    train(config(rlhf_train_file=str(tmp_path / "mixed.save"), epoch_count=1, epoch_steps=1), {})
    assert "left out 0 pairs longer than 512 tokens and 5 with an empty answer; 12 remain" in capsys.readouterr().err


@pytest.mark.parametrize(("version", "precision", "quantization"), [("x070", "fp32", None), ("x060", "bf16", "nf4")])
def test_before_the_first_step_the_policy_is_the_reference(config, material, tmp_path, version, precision, quantization):
    """From pairs to thumbs to a run: no reward, no KL, and half of each weight as its loss."""
    thumbs = tmp_path / "thumbs.save"
    prepare_csv(material / f"{version}.pth", material / "pairs.csv", thumbs, precision, quantization, unpair=True)
    flags = {name: value for name, value in FLAGS.items() if name != "kto_alpha"}
    run = config(version, rlhf_train_file=str(thumbs), precision=precision, quantization=quantization,
                 micro_bsz=4, accumulate_grad_batches=6, epoch_steps=6, epoch_count=1, **flags)
    train(run, {})
    line, = lines(Path(run.run.proj_dir) / "metrics.jsonl")
    # Sums of hundreds of nats round at 1e-5 in float32; in bf16 a token's log-probability moves by up to a hundredth of a nat.
    nats = 1e-3 if precision == "fp32" else 1.0
    assert line["kl"] <= nats and abs(line["reward_chosen"]) <= BETA * nats >= abs(line["reward_rejected"])
    assert line["loss"] == pytest.approx((UP + DOWN) / 4, abs=nats / 10)
