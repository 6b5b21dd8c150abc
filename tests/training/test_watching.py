"""What one watches while a run trains: the bar on a terminal, lines elsewhere, TensorBoard, wandb."""

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import src.training.metrics as metrics_of_steps
import src.training.progress as progress
import src.training.watching as watching
from src.training.run import train
from tests.training.outside import lines

NUMBERS = (r"loss \d\.\d{4} pref \d+% margin [+-]\d\.\d{4} [\d.e+]+ pairs/s \d+ tok/s \d+\.\d GiB")


@pytest.fixture
def clock(monkeypatch):
    """What a run takes for the time, `clock.now` in seconds: each micro-batch takes `clock.step` of them, and all else none."""
    clock = SimpleNamespace(now=1000.0, step=1.0)

    def pass_a_step(*_) -> None:
        clock.now += clock.step

    for module in (metrics_of_steps, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(progress, "Progress", partial(Progress, get_time=lambda: clock.now))
    monkeypatch.setattr(metrics_of_steps.StepMetrics, "on_train_batch_start", pass_a_step, raising=False)
    return clock


@pytest.mark.parametrize("columns", [100, 80, 50])
def test_a_terminal_shows_everything_with_the_time_left(config, prepared, terminal, clock, monkeypatch, columns):
    text = terminal(columns)
    update = progress.ProgressBar.on_train_batch_end

    def update_and_draw(bar, *arguments) -> None:
        update(bar, *arguments)
        bar.live.refresh()  # else it is drawn ten times a second

    monkeypatch.setattr(progress.ProgressBar, "on_train_batch_end", update_and_draw)
    run = config(eval_file=str(prepared("x070")))
    train(run, {})
    shown = " ".join(text().split())
    assert re.search(NUMBERS, shown)
    # Also drawn, by a thread, whenever that comes to it.
    assert {f"{step}/8 0:00:0{step} 0:00:0{8 - step}" for step in range(2, 9)} <= \
        set(re.findall(r"training \S+ +(\d/8 0:00:0\d 0:00:0\d)", shown))
    steps = re.findall(r"training \S+ +(\d)/8 ", shown)
    assert steps == sorted(steps)
    last = lines(Path(run.run.proj_dir) / "metrics.jsonl")[-1]
    final = (f"epoch 2, step 8/8: loss {last['loss']:.4f} pref {last['pref_percentage']:.0%} margin {last['margin']:+.4f} "
             f"{last['pairs_per_s']:.3g} pairs/s {last['tokens_per_s']:.0f} tok/s {last['peak_memory_bytes'] / 2**30:.1f} GiB; "
             f"held out: accuracy 1.000")
    assert final in shown


def test_the_time_left_is_told_of_steps_that_take_minutes(config, monkeypatch):
    clock = [0.0]
    bar = progress.ProgressBar(metrics_of_steps.StepMetrics(Path("nowhere")), None, 10)
    monkeypatch.setattr(bar.bar, "get_time", lambda: clock[0])
    task = bar.bar.add_task("training", total=10)
    for step in range(1, 5):
        clock[0] += 240.0
        bar.bar.update(task, completed=step)
    assert bar.bar.tasks[0].time_remaining == 6 * 240


def test_elsewhere_there_are_plain_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    train(config(), {})
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\r" not in err
    found = re.findall(rf"^step (\d)/8, (\d+) s left: {NUMBERS}$", err, re.MULTILINE)
    assert [int(step) for step, _ in found] == [1, 2, 3, 4, 5, 6, 7, 8] and found[-1][1] == "0"
    assert len(re.findall(rf"^epoch \d, step \d/8: {NUMBERS}$", err, re.MULTILINE)) == 2
    monkeypatch.undo()


def test_pairs_and_tokens_a_second_are_those_of_the_steps_alone(config, prepared, monkeypatch, clock):
    evaluate = watching.evaluate_pairs

    def slow_evaluate(*given):
        clock.now += 100.0
        return evaluate(*given)

    monkeypatch.setattr(watching, "evaluate_pairs", slow_evaluate)
    run = config(eval_file=str(prepared("x070")), accumulate_grad_batches=2, epoch_steps=8)
    train(run, {})
    metrics = lines(Path(run.run.proj_dir) / "metrics.jsonl")
    # Two micro-batches of two pairs.
    assert [line["pairs_per_s"] for line in metrics] == [2.0] * 8
    assert all(line["tokens_per_s"] > 2 * 20 for line in metrics)  # a pair has more tokens than that
    taken = [after["elapsed_s"] - before["elapsed_s"] for before, after in zip(metrics, metrics[1:], strict=False)]
    assert taken == [2.0, 2.0, 2.0, 102.0, 2.0, 2.0, 2.0]


def test_a_warm_up_that_lasts_as_long_as_the_run_is_said(config, capsys):
    train(config(epoch_count=1, epoch_steps=4, warmup_steps=4), {})
    line = "warning: --warmup_steps 4 lasts as long as the run, so the full learning rate is never reached\n"
    assert line in capsys.readouterr().err


def test_tensorboard_and_wandb_at_once(config, prepared, monkeypatch, tmp_path, capfd):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = config(eval_file=str(prepared("x070")), tensorboard=True, wandb="a project")
    train(run, {})
    folder = Path(run.run.proj_dir)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    metrics, held_out = lines(folder / "metrics.jsonl"), lines(folder / "eval.jsonl")
    for name in ("margin", "pref_percentage", "loss", "pairs_per_s"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert seen == [(line["step"], pytest.approx(line[name])) for line in metrics]
    assert [(event.step, event.value) for event in events.Scalars("eval/accuracy")] == \
        [(line["step"], line["accuracy"]) for line in held_out]
    assert list(folder.glob("wandb/offline-run-*"))
    assert "anonymous" not in capfd.readouterr().err
