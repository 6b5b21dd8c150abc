"""A run's progress, called as the trainer does: plain lines now and then, or a bar on a terminal."""

from functools import partial
from types import SimpleNamespace

import pytest
from rich.progress import Progress

import src.training.progress as progress
from src.training.progress import ProgressBar

STEP = {"loss": 0.70314, "pref_percentage": 0.455, "margin": 0.01234, "pairs_per_s": 12.34, "tokens_per_s": 1234.6,
        "peak_memory_bytes": 3 << 30}
WORDS = "loss 0.7031 pref 46% margin +0.0123 12.3 pairs/s 1235 tok/s 3.0 GiB"
TEXTS = {name: STEP[name] for name in ("loss", "tokens_per_s", "peak_memory_bytes")}
WORDS_OF_TEXTS = "loss 0.7031 1235 tok/s 3.0 GiB"
TOTAL = 8


@pytest.fixture
def clock(monkeypatch):
    """What a run takes for the time, `clock.now` in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(progress, "Progress", partial(Progress, get_time=lambda: clock.now))
    return clock


@pytest.fixture
def run(clock):
    """`run(first_step)`: a bar of eight steps, its trainer, and the numbers of the last step, which there aren't yet."""

    def make(first_step: int = 0, held_out=None, first: bool = True) -> SimpleNamespace:
        run = SimpleNamespace(numbers=SimpleNamespace(last={}), clock=clock,
                              trainer=SimpleNamespace(global_step=first_step, current_epoch=0, is_global_zero=first))
        run.bar = ProgressBar(run.numbers, held_out, TOTAL)
        run.bar.on_train_start(run.trainer, None)
        return run

    return make


def micro_batch(run, seconds: float, step: int, number: int = 0) -> None:
    """One that ends so many seconds after the one before, and after which so many steps are done."""
    run.clock.now += seconds
    run.trainer.global_step = step
    if step:
        run.numbers.last = STEP
    run.bar.on_train_batch_end(run.trainer, None, None, None, number)


def epoch(run, number: int, begin: int = 0) -> None:
    run.trainer.current_epoch = number
    run.bar.on_train_epoch_end(run.trainer, SimpleNamespace(config=SimpleNamespace(steps=SimpleNamespace(epoch_begin=begin))))


def test_a_line_every_half_minute_tells_the_time_left(run, capsys):
    assert progress.LINE_EVERY == 30.0
    one = run()
    micro_batch(one, 29.9, 1)
    assert capsys.readouterr().err == ""
    micro_batch(one, 0.1, 2)
    assert capsys.readouterr().err == f"step 2/8, 90 s left: {WORDS}\n"
    micro_batch(one, 29.0, 3)
    assert capsys.readouterr().err == ""
    micro_batch(one, 21.0, 4)
    assert capsys.readouterr().err == f"step 4/8, 80 s left: {WORDS}\n"


def test_after_a_resume_the_time_left_is_told_from_the_steps_since(run, capsys):
    one = run(first_step=4)
    micro_batch(one, 60.0, 6)
    assert capsys.readouterr().err == f"step 6/8, 60 s left: {WORDS}\n"


def test_before_the_first_step_micro_batches_are_told(run, capsys):
    one = run(first_step=4)
    for number in range(7):
        micro_batch(one, 10.0, 4, number)
    assert capsys.readouterr().err == "step 4/8: 3 micro-batches done\nstep 4/8: 6 micro-batches done\n"


@pytest.mark.parametrize(("last", "held_out", "line"), [
    (STEP, None, WORDS), (TEXTS, None, WORDS_OF_TEXTS), (STEP, {}, WORDS), ({}, None, ""),
    (STEP, {"accuracy": 0.91, "margin": -0.5, "loss": 0.6}, f"{WORDS}; held out: accuracy 0.910, margin -0.5000"),
    (TEXTS, {"loss": 1.25}, f"{WORDS_OF_TEXTS}; held out: 1.2500 nats a token"),
])
def test_the_line_after_each_epoch(run, capsys, last, held_out, line):
    one = run(held_out=None if held_out is None else SimpleNamespace(last=held_out))
    one.numbers.last, one.trainer.global_step = last, 4
    epoch(one, 0)
    epoch(one, 1, begin=3)
    assert capsys.readouterr().err == f"epoch 1, step 4/8: {line}\nepoch 5, step 4/8: {line}\n"


def test_other_processes_tell_nothing(run, terminal):
    shown, one = terminal(80), run(first=False)
    micro_batch(one, 99.0, 1)
    epoch(one, 0)
    one.bar.on_train_end()
    assert shown() == ""


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_on_a_terminal_a_bar_has_the_numbers_below_it_and_lines_above(run, terminal, end):
    shown, one = terminal(100), run(first_step=2)
    one.bar.live.refresh()
    for seconds, step in ((20.0, 3), (40.0, 5)):
        micro_batch(one, seconds, step)
        one.bar.live.refresh()
    epoch(one, 0)
    getattr(one.bar, end)()
    assert not one.bar.live.is_started
    lines = [line.strip() for line in shown().splitlines() if line.strip()]
    bars = [line.split()[-3:] for line in lines if line.startswith("training ")]
    assert bars[0] == ["2/8", "0:00:00", "-:--:--"] and bars[-1] == ["5/8", "0:01:00", "0:01:00"]
    assert lines[-1] == WORDS and f"epoch 1, step 5/8: {WORDS}" in lines
    first_numbers = lines.index(WORDS)
    assert {line.split()[0] for line in lines[:first_numbers]} == {"training"}  # no numbers before there are any
    assert not [line for line in lines if "left" in line]


def test_in_a_file_the_end_is_no_line(run, capsys):
    one = run()
    one.bar.on_train_end()
    one.bar.on_exception()
    assert capsys.readouterr() == ("", "")
