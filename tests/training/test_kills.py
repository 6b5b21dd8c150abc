"""A run that is killed between any two writes: its continuation leaves the folder of an unbroken one."""

import os
import signal
import sys
from pathlib import Path
from random import Random

import pytest
import torch

import src.training.metrics as metrics
import src.training.watching as watching
from src.errors import Stopped, signal_behind
from src.generation.greedy import likeliest_answers
from src.training.run import train
from tests.settings import changed
from tests.training.outside import lines
from tests.training.test_run import numbers


class Killed(BaseException):
    """As if the process were gone: whatever would be cleaned up on the way out is not."""


class Plug:
    """Counts the moments before and after whatever reaches the disk, and ends the run for good at the one it is told."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None):
        self.count, self.at, self.dead = 0, at, False
        fsync, unlink, append = os.fsync, Path.unlink, metrics.append_line

        def appended(path: Path, values: dict) -> None:
            self.moment()
            if self.at == self.count:  # half of a line is there
                before = path.read_bytes() if path.exists() else b""
                append(path, values)
                path.write_bytes(before + path.read_bytes()[len(before):][:9])
            self.moment()
            append(path, values)
            self.moment()

        patch.setattr(os, "fsync", lambda descriptor: (self.moment(), fsync(descriptor), self.moment()))
        patch.setattr(Path, "unlink", lambda path, **named: self.moment(counts=False) or unlink(path, **named))
        for module in (metrics, watching):
            patch.setattr(module, "append_line", appended)

    def moment(self, counts: bool = True) -> None:
        self.dead |= counts and self.count == self.at
        self.count += counts
        if self.dead:
            raise Killed


@pytest.fixture
def unbroken(config, prepared, tmp_path, monkeypatch):
    """A run of two epochs that trains states, and how many moments it has."""
    monkeypatch.setattr("src.evaluation.report.curve_svgs", lambda *_: [])  # which takes longer than the run
    monkeypatch.setattr("src.training.run.draw_curves", lambda *given: given[2].write_text("curves"))
    run = config(peft="state", epoch_steps=1, eval_file=str(prepared("x070")), samples=1, proj_dir=str(tmp_path / "unbroken"))
    with pytest.MonkeyPatch.context() as patch:
        plug = Plug(patch)
        train(run, {}, likeliest_answers)
    return run, plug.count


def check(run, number: int) -> None:
    broken = changed(run, proj_dir=f"{run.run.proj_dir}-{number}")
    with pytest.MonkeyPatch.context() as patch:
        Plug(patch, number)
        with pytest.raises(Killed):
            train(broken, {}, likeliest_answers)
    torch.manual_seed(99)  # what another process would start with
    train(changed(broken, resume=True), {}, likeliest_answers)
    same_folders(Path(run.run.proj_dir), Path(broken.run.proj_dir))


def same_folders(ours: Path, theirs: Path) -> None:
    """But for times."""
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert numbers(ours / name) == numbers(theirs / name)
    assert lines(ours / "samples.jsonl") == lines(theirs / "samples.jsonl")
    for path in ours.glob("rwkv-*"):
        assert path.read_bytes() == (theirs / path.name).read_bytes(), path.name
    assert "Finished after" in (theirs / "report.html").read_text()


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2))])
def test_killed_now_and_then(unbroken, part):
    run, moments = unbroken
    for number in range(part * 5, moments, 23):
        check(run, number)


@pytest.mark.slow
def test_killed_between_any_two_writes(unbroken):
    run, moments = unbroken
    for number in range(moments):
        check(run, number)


@pytest.mark.parametrize("name", ["rwkv-final.safetensors", "report.html", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("rwkv-final.state.pth", "curves.png", "rwkv-2.safetensors"))])
def test_a_finished_run_gets_back_what_is_missing(unbroken, capsys, name):
    run, _ = unbroken
    folder = Path(run.run.proj_dir)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    capsys.readouterr()
    train(changed(run, resume=True), {}, likeliest_answers)
    assert name == "report.html" or (folder / name).read_bytes() == content
    done = capsys.readouterr().err.splitlines()[-1].removeprefix("done: ").split(", ")
    assert len(done) == 3 and all(Path(path).is_file() for path in done)


def test_what_a_killed_process_left_half_written_goes_and_nothing_else(unbroken):
    run, _ = unbroken
    folder = Path(run.run.proj_dir)
    ours = (".metrics.jsonl.a1b2c3d4.tmp", ".last.ckpt.abcdefgh.tmp", ".rwkv-12.state.pth.x_y_z_00.tmp", ".last.ckpt.tmp",
            ".rwkv-final.safetensors.abcdefgh.tmp", ".config.json.abcdefgh.tmp", ".wandb-run-id.abcdefgh.tmp")
    theirs = (".notes.txt.abcdefgh.tmp", ".metrics.jsonl.tmp", "metrics.jsonl.abcdefgh.tmp", ".rwkv-x.safetensors.abcdefgh.tmp",
              ".metrics.jsonl.ABCDEFGH.tmp")
    for name in (*ours, *theirs):
        (folder / name).write_text("half")
    (folder / ".eval.jsonl.abcdefgh.tmp").mkdir()
    train(changed(run, resume=True), {}, likeliest_answers)
    left = {path.name for path in folder.iterdir()}
    assert not left & set(ours) and left >= {*theirs, ".eval.jsonl.abcdefgh.tmp"}


@pytest.mark.slow
def test_signals_at_any_moment_end_the_run_and_lose_nothing(unbroken):
    run, _ = unbroken
    generator, ended = Random(0), 0

    def stop(number: int, _: object) -> None:
        if not signal_behind(sys.exception()):
            raise Stopped(number)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for number in range(40):
            stopped = changed(run, proj_dir=f"{run.run.proj_dir}-{number}")
            # Again, as scripts raise it, since a destructor may swallow it.
            signal.setitimer(signal.ITIMER_REAL, generator.uniform(0.001, 0.5), 0.1)
            try:
                train(stopped, {}, likeliest_answers)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                signal.setitimer(signal.ITIMER_REAL, 0)
                ended += 1
            torch.manual_seed(99)
            train(changed(stopped, resume=True), {}, likeliest_answers)
            same_folders(Path(run.run.proj_dir), Path(stopped.run.proj_dir))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended > 0
