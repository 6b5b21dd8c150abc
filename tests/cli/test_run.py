"""What becomes of an error at the top of a script: one line where the user can mend it, a traceback where only we can."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from src.cli.run import run
from src.errors import UserError
from tests.cli.conftest import SCRIPTS, check_told, words_of

ROOT = Path(__file__).parents[2]


def ended_by(error: BaseException | None, monkeypatch, capsys, then=None) -> tuple[int, str]:
    def main(arguments: list[str]) -> None:
        if then:
            then()
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(10**15), lambda: torch.empty(2**40, 2**40), lambda: [0] * 10**15, lambda: torch.zeros(10**15).numpy(),
    lambda: torch.zeros(1, 1).expand(10**8, 10**8).contiguous()])
def test_memory_that_runs_out(monkeypatch, capsys, allocate):
    check_told(*ended_by(None, monkeypatch, capsys, allocate), ("the machine's memory is full", "take a smaller batch"))


def test_a_devices_memory(monkeypatch, capsys):
    check_told(*ended_by(torch.OutOfMemoryError("CUDA out of memory"), monkeypatch, capsys), ("the device's memory is full",))


def test_what_the_system_refuses_has_the_files_name(monkeypatch, capsys):
    error = OSError(errno.EACCES, "Permission denied", "some/file")
    check_told(*ended_by(error, monkeypatch, capsys), ("some/file: Permission denied",))


def test_a_message_of_several_lines_is_one(monkeypatch, capsys):
    check_told(*ended_by(UserError("x.csv: one\n  two\x1b[2J"), monkeypatch, capsys), (r"x.csv: one two\x1b[2J",))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_current_folder_that_is_gone(good, tmp_path, script):
    gone = tmp_path / "gone"
    command = [sys.executable, str(ROOT / f"{script}.py"), *words_of(good(script))]
    done = subprocess.run(["sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(gone), *command],
                          capture_output=True, text=True)
    check_told(done.returncode, done.stderr, ("the current folder is gone; cd to another one",))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
@pytest.mark.parametrize("value", ["", "x", "1.5"])
def test_a_rank_that_is_no_number(call, good, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for script in ("train", "evaluate"):
        check_told(*call(script, words_of(good(script))), (name, "unset it"))
    assert call("merge", words_of(good("merge")))[0] == 0  # which asks for no launcher


@pytest.mark.parametrize("error", [RuntimeError("a shape"), KeyError("x"), OSError("no number")])
def test_a_fault_of_ours_is_not_hidden(monkeypatch, error):
    def main(arguments: list[str]) -> None:
        raise error

    with pytest.raises(type(error)):
        run(main)
