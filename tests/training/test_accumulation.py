"""The gradient of an optimizer step is that of the mean over its pairs (tokens, with texts), whatever the micro-batches: every
step of real runs against one big batch in float64."""

import functools
import json
from pathlib import Path

import pytest
import torch

from tests.settings import changed
from tests.training.exact import ALPHA, BETA, Exact, Watched, save_pairs
from tests.training.outside import lines
from tests.training.test_run import numbers, stop_in_the_second_epoch

# Weights stay as they are, so that one oracle holds for all steps; every parameter of the blocks trains.
STILL = dict(peft="full", lr_init=1e-9, lr_final=1e-10, warmup_steps=0, gradient_clip_val=0.0, dpo_beta=BETA, dpo_alpha=ALPHA,
             epoch_steps=0, allow_reference_mismatch=True)
# Float32 carries 1e-7; sums over some hundred tokens of a random model lose two digits of it.
CLOSE = 1e-4


@pytest.fixture(scope="session")
def exact(material):
    return functools.cache(lambda version: Exact(material / f"{version}.pth"))


@pytest.fixture(scope="session")
def five(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    return functools.cache(lambda version: save_pairs(prepared(version), folder / f"{version}.save"))


@pytest.fixture(scope="session")
def by_hand(exact):
    """`by_hand(version, pairs)` -> loss and gradient of the mean over these pairs."""
    once = functools.cache(lambda version, pair: exact(version).pair(tuple(list(x) if isinstance(x, tuple) else x for x in pair)))

    def mean(version, pairs):
        found = [once(version, tuple(tuple(x) if isinstance(x, list) else x for x in pair)) for pair in pairs]
        return sum(value for value, _ in found) / len(found), torch.stack([gradient for _, gradient in found]).mean(0)

    return mean


def check(watched: Watched, run, expected) -> list[dict]:
    """Every step of the run against `expected(pairs of the step)` -> loss, gradient; returns the lines of metrics.jsonl."""
    metrics = lines(Path(run.run.proj_dir) / "metrics.jsonl")
    assert len(metrics) == len(watched.gradients) == len(watched.steps)
    assert json.loads((Path(run.run.proj_dir) / "config.json").read_text())["total_steps"] == len(metrics)
    assert metrics[-1]["lr"] == pytest.approx(1e-10 if len(metrics) > 1 else 1e-9)
    for gradient, pairs, line in zip(watched.gradients, watched.steps, metrics, strict=True):
        loss, right = expected(pairs)
        assert (gradient - right).norm() < CLOSE * right.norm()
        assert line["grad_norm"] == pytest.approx(right.norm().item(), rel=CLOSE)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
    return metrics


@pytest.mark.parametrize(("version", "changes", "sizes"), [
    ("x070", dict(micro_bsz=5), [5]),
    ("x070", dict(micro_bsz=1, accumulate_grad_batches=5), [5]),
    ("x070", dict(micro_bsz=1, accumulate_grad_batches=4, epoch_count=2), [4, 1, 4, 1]),
    ("x060", dict(micro_bsz=1, accumulate_grad_batches=4), [4, 1]),
    ("x060", dict(micro_bsz=1, accumulate_grad_batches=8), [5]),
    ("x070", dict(micro_bsz=4, accumulate_grad_batches=2), [5]),
    ("x070", dict(micro_bsz=2, accumulate_grad_batches=2, epoch_steps=3, epoch_count=2), [4, 2, 4, 2]),
    ("x060", dict(batch_tokens=180, accumulate_grad_batches=8, epoch_count=2, grad_cp=True), [5, 5]),
], ids=["whole", "accumulated", "left over", "left over, v6", "more than there are", "unequal", "across passes", "by tokens"])
def test_every_step_of_pairs(config, five, exact, by_hand, version, changes, sizes):
    run = config(version, rlhf_train_file=str(five(version)), **STILL | dict(epoch_count=1) | changes)
    watched = Watched(run, exact(version).parameters)
    assert [len(step) for step in watched.steps] == sizes
    if "batch_tokens" in changes:
        assert sorted(len(batch) for batch in watched.epochs[0]) == [2, 3]
    metrics = check(watched, run, functools.partial(by_hand, version))
    for pairs, line in zip(watched.steps, metrics, strict=True):
        # Of the base's log-probabilities, from which the references were moved.
        margins = [BETA * (3.0 - 3 * number) for number in map(number_of, pairs)]
        assert line["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
        if 1 not in map(number_of, pairs):  # whose margin is 0 up to rounding
            assert line["pref_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / len(margins))


def number_of(pair: tuple) -> int:
    return len(pair[2]) - len(" No idea\n\n")


def test_every_epoch_has_its_own_micro_batches_and_a_resumed_run_the_same(config, five, exact, by_hand, tmp_path, monkeypatch):
    """By tokens, passes differ in how many micro-batches they have; two pairs at a time are enough to show it."""
    monkeypatch.setattr("src.data.batching.WINDOW", 2)
    run = config(rlhf_train_file=str(five("x070")), **STILL | dict(batch_tokens=130, accumulate_grad_batches=3, epoch_count=4))
    whole = Watched(run, exact("x070").parameters)
    assert [len(epoch) for epoch in whole.epochs] == [4, 3, 4, 4]
    assert all(sorted(number_of(pair) for batch in epoch for pair in batch) == list(range(5)) for epoch in whole.epochs)
    check(whole, run, functools.partial(by_hand, "x070"))

    broken = changed(run, proj_dir=str(tmp_path / "broken"))
    with monkeypatch.context() as patch:
        patch.setattr("src.training.saving.SaveAdapters.on_train_batch_end", stop_in_the_second_epoch, raising=False)
        with pytest.raises(ConnectionError):
            Watched(broken, exact("x070").parameters)
    assert Watched(changed(broken, resume=True), exact("x070").parameters).epochs == whole.epochs[1:]
    assert numbers(tmp_path / "broken" / "metrics.jsonl") == numbers(Path(run.run.proj_dir) / "metrics.jsonl")


@pytest.mark.parametrize(("version", "changes", "sizes"), [
    ("x070", dict(micro_bsz=1, accumulate_grad_batches=3), [3]),
    ("x060", dict(micro_bsz=1, accumulate_grad_batches=2, epoch_count=2), [2, 1, 2, 1]),
    ("x070", dict(micro_bsz=2, accumulate_grad_batches=2, sft_on_prompt=True), [3]),
    ("x070", dict(batch_tokens=90, accumulate_grad_batches=4), [3]),
], ids=["accumulated", "left over, v6", "unequal, with prompts", "by tokens"])
def test_every_step_of_texts_is_the_mean_over_its_tokens(config, exact, tmp_path, version, changes, sizes):
    rows = [{"prompt": "Count." * (3 - n), "completion": "One, two, three. " * (1 + 2 * n)} for n in range(3)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = config(version, **STILL | dict(sft=True, epoch_count=1) | changes)
    run = changed(run, rlhf_train_file=None, train_data_file=str(tmp_path / "texts.jsonl"))
    watched = Watched(run, exact(version).parameters)
    assert [len(step) for step in watched.steps] == sizes

    def mean(texts):
        found = [exact(version).text(*text) for text in texts]
        tokens = sum(count for *_, count in found)
        assert len({count for *_, count in found}) == len(texts)
        return sum(total for total, *_ in found) / tokens, sum(gradient for _, gradient, _ in found) / tokens

    for line in check(watched, run, mean):
        assert line["loss"] == line["sft_loss"]
