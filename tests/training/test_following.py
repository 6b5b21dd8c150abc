"""A process that another one started is gone when that one is, from its first moment on; and a notebook starts none."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from src.errors import UserError
from src.training.following import command_to_follow, follow_starter
from src.training.processes import quiet
from src.training.run import train
from tests.settings import changed

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


@pytest.fixture
def started(monkeypatch):
    """This process as one that another one started: `started.gone()` ends the other end of its stdin, `started.exits` are the
    codes that it has ended with since, and `started.threads()` those that began in the test."""
    exits, before, threads = [], os.dup(0), {*threading.enumerate()}
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setitem(sys._xoptions, command_to_follow([])[-1], True)
    ours, theirs = os.pipe()
    os.dup2(ours, 0)
    os.close(ours)
    starter = os.fdopen(theirs, "wb")
    started = SimpleNamespace(exits=exits, gone=starter.close, threads=lambda: [*{*threading.enumerate()} - threads])
    yield started
    starter.close()
    for thread in started.threads():
        thread.join(30.0)
    os.dup2(before, 0)
    os.close(before)


@contextmanager
def followed():
    follow_starter()
    yield


@pytest.mark.parametrize("around", [followed, quiet])
def test_a_started_process_ends_with_its_starter(started, around):
    with around():
        thread, = started.threads()
        assert thread.daemon  # or a process whose work is done would wait for its starter's end
        thread.join(0.05)
        assert thread.is_alive() and not started.exits
        started.gone()
        thread.join(30.0)
    assert started.exits == [1]


def test_a_process_that_nobody_started_follows_none(started, monkeypatch):
    monkeypatch.delitem(sys._xoptions, command_to_follow([])[-1])
    follow_starter()
    assert not started.threads() and not started.exits


@pytest.mark.parametrize("argv", [["python", "-m", "ipykernel_launcher"], ["python"]])
def test_where_no_script_runs_several_devices_are_refused_before_anything_is_written(config, tmp_path, monkeypatch, argv):
    for name in ("__file__", "__spec__"):
        monkeypatch.delattr(sys.modules["__main__"], name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", argv)
    with pytest.raises(UserError, match=r"--devices 2: .*; run train.py, or take --devices 1 here"):
        train(changed(config(), devices=2), {})
    assert not (tmp_path / "run").exists()
