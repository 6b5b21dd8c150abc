"""A process that another one started is gone when that one is, from its first moment on; and a notebook starts none."""

import os
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from src.errors import UserError
from src.training.following import command_to_follow, follow_starter
from src.training.processes import quiet
from src.training.run import train
from tests.settings import changed
from tests.training.test_processes import in_a_fork

ROOT = Path(__file__).parents[2]
HUNG = 900.0  # seconds after which a process will not end any more, however busy the machine


@pytest.mark.parametrize(("command", "code"), [
    (command_to_follow(["train.py", "--help"]), 1), ([sys.executable, "train.py", "--help"], 0)])
def test_it_ends_while_it_still_imports_unless_nobody_started_it(command, code):
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process.stdin.close()
    assert process.wait(HUNG) == code


def test_what_it_starts_itself_does_not_follow():
    asked = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; print(sys._xoptions)'])"
    process = subprocess.Popen(command_to_follow(["-c", asked]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=HUNG)[0] == "{}\n"


def follower(work, pipe: int, of_its_starter: int, seconds: float) -> None:
    """As a process that the first one started, with a pipe from it, do the work and then be busy for some seconds."""
    sys._xoptions[command_to_follow([])[-1]] = True
    os.close(of_its_starter)
    os.dup2(pipe, 0)
    work()
    time.sleep(seconds)


def follow_quietly() -> None:
    quiet().__enter__()


@pytest.mark.parametrize("work", [follow_starter, follow_quietly])
def test_a_started_process_ends_with_its_starter(work):
    ours, theirs = os.pipe()
    child = get_context("fork").Process(target=follower, args=(work, ours, theirs, 30.0))
    child.start()
    try:
        child.join(0.1)
        assert child.exitcode is None  # nothing has happened to its starter yet
        os.close(theirs)
        child.join(30.0)
        assert child.exitcode == 1
    finally:
        os.close(ours)
        child.kill()
        child.join()


def test_a_started_process_ends_when_its_work_is_done():
    ours, theirs = os.pipe()
    assert in_a_fork(follower, follow_starter, ours, theirs, 0.0) == 0
    os.close(ours)
    os.close(theirs)


def test_a_process_that_nobody_started_follows_none():
    def with_an_empty_stdin() -> None:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        follow_starter()
        time.sleep(0.1)

    assert in_a_fork(with_an_empty_stdin) == 0


@pytest.mark.parametrize("argv", [["python", "-m", "ipykernel_launcher"], ["python"]])
def test_where_no_script_runs_several_devices_are_refused_before_anything_is_written(config, tmp_path, monkeypatch, argv):
    for name in ("__file__", "__spec__"):
        monkeypatch.delattr(sys.modules["__main__"], name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", argv)
    with pytest.raises(UserError, match=r"--devices 2: .*; run train.py, or take --devices 1 here"):
        train(changed(config(), devices=2), {})
    assert not (tmp_path / "run").exists()
