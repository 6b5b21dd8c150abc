"""A process that another one started is gone when that one is, from its first moment on; and a notebook starts none."""

import subprocess
import sys
from pathlib import Path

import pytest

from src.errors import UserError
from src.training.following import command_to_follow
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


@pytest.mark.parametrize("argv", [["python", "-m", "ipykernel_launcher"], ["python"]])
def test_where_no_script_runs_several_devices_are_refused_before_anything_is_written(config, tmp_path, monkeypatch, argv):
    for name in ("__file__", "__spec__"):
        monkeypatch.delattr(sys.modules["__main__"], name, raising=False)
    monkeypatch.setattr(sys, "orig_argv", argv)
    with pytest.raises(UserError, match=r"--devices 2: .*; run train.py, or take --devices 1 here"):
        train(changed(config(), devices=2), {})
    assert not (tmp_path / "run").exists()
