"""The first process of a run on several devices and the others: each is told its place, and they end together."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import src.training.processes as processes
from src.errors import SIGNALS, Stopped, UserError
from src.training.processes import Others, check_can_start_others, quiet, share_cores

HUNG = 60.0  # seconds after which what takes a moment will not happen any more, however busy the machine
SLEEP = f"import time; time.sleep({HUNG})"
PORT = 29876


@pytest.fixture
def others(monkeypatch, tmp_path):
    """`others(code)`: two processes beside this one that run this code in a folder of their own, once they are entered."""
    made = []
    monkeypatch.chdir(tmp_path)

    def make(code: str) -> Others:
        monkeypatch.setattr(sys, "orig_argv", ["python", "-c", code])
        made.append(Others(2, PORT))
        return made[-1]

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield make
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for process in (process for one in made for process in one.processes):
        process.kill()
        process.wait()


def gone(others: Others) -> bool:
    return len(others.processes) == 2 and all(process.poll() is not None for process in others.processes)


def test_each_is_told_its_place_as_torch_wants_it_and_leaves_signals_to_the_first(others, monkeypatch):
    told = ("import json, os, pathlib, signal; blocked = [*map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))]\n"
            "pathlib.Path(os.environ['RANK']).write_text(json.dumps([dict(os.environ), blocked]))")
    monkeypatch.setenv("SET_BY_THE_USER", "to this")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with others(told) as started:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert [process.returncode for process in started.processes] == [0, 0]  # what they were at was not cut short
    for rank in ("1", "2"):
        place, blocked = json.loads(Path(rank).read_text())
        assert place.items() >= {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": "3",
                                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "SET_BY_THE_USER": "to this"}.items()
        assert set(blocked) >= {*SIGNALS}
    assert sorted(path.name for path in Path().iterdir()) == ["1", "2"]


def test_a_pipe_tells_them_when_the_first_is_gone(others):
    with others("import sys; sys.stdin.read()") as started:
        assert started.processes[0].poll() is None
        started.processes[0].stdin.close()
        assert started.processes[0].wait(HUNG) == 0 and started.processes[1].poll() is None
        started.processes[1].stdin.close()


def test_after_the_run_they_have_a_while_to_end(others, monkeypatch):
    monkeypatch.setattr(processes, "ANSWER_TIMEOUT", 0.1)
    with others(SLEEP) as started:
        assert not gone(started)
    assert gone(started)


@pytest.mark.parametrize(("ends", "how"), [("sys.exit(1)", "exit code 1"), ("os.kill(os.getpid(), 9)", "SIGKILL")])
def test_where_another_made_this_one_fail_that_one_is_blamed(others, ends, how):
    """Messages fail at once, while the other may still be busy with its end."""
    code = f"import os, sys, time\nif os.environ['RANK'] == '1': time.sleep({HUNG})\ntime.sleep(0.6); {ends}"
    told = f"^process 2 of the run ended with {how}; .*--resume 1"
    with pytest.raises(UserError, match=told) as caught, others(code) as started:
        raise ConnectionError("no answer")
    assert isinstance(caught.value.__cause__, ConnectionError) and gone(started)


@pytest.mark.parametrize("told_by_lightning", [False, True])
def test_an_error_of_its_own_ends_the_others_and_is_told_itself(others, monkeypatch, told_by_lightning):
    monkeypatch.setattr(processes, "PATIENCE", 0.05)
    error = ConnectionError("its own")
    with pytest.raises(ConnectionError, match="its own"), others(SLEEP) as started:
        if told_by_lightning:
            started.on_exception(None, None, error)
            assert gone(started)
        raise error
    assert gone(started)


def test_what_another_did_is_still_known_at_the_end(others):
    error = ConnectionError("no answer")
    with pytest.raises(UserError, match="process 1 of the run ended with exit code 7"), others("raise SystemExit(7)") as started:
        started.on_exception(None, None, error)
        raise error


@pytest.mark.parametrize("error", [UserError("a flag is wrong"), Stopped(signal.SIGTERM), KeyboardInterrupt()])
def test_an_error_that_needs_no_explanation_ends_them_at_once_and_is_told_itself(others, monkeypatch, error):
    monkeypatch.setattr(processes, "PATIENCE", HUNG)
    begun, code = time.monotonic(), f"import os\nif os.environ['RANK'] == '1': {SLEEP}\nos._exit(1)"
    with pytest.raises(type(error)) as caught, others(code) as started:
        started.processes[1].wait()
        raise error
    assert caught.value is error and gone(started) and time.monotonic() - begun < HUNG


class Soon(threading.Event):
    """Whoever waits some seconds for it waits a twentieth of them."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(timeout and timeout / 20)


@pytest.fixture
def exits(monkeypatch) -> list[int]:
    """Codes with which this process would have ended."""
    exits = []

    def leave(code: int) -> None:
        exits.append(code)
        sys.exit()  # ends the thread

    monkeypatch.setattr(os, "_exit", leave)
    return exits


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_first_gives_up_waiting_for_one_that_has_ended(others, exits, monkeypatch, capsys):
    """On a GPU it would wait for ever."""
    monkeypatch.setattr(processes, "ANSWER_TIMEOUT", 1.0)
    one = others(f"import os\nif os.environ['RANK'] == '2': {SLEEP}\nraise SystemExit(3)")
    one.over, end = Soon(), time.monotonic() + HUNG / 2
    with one:
        while not exits and time.monotonic() < end:
            time.sleep(0.001)
        assert exits == [2] and one.processes[1].wait(HUNG / 2) == -signal.SIGKILL
    assert capsys.readouterr().err.startswith("error: process 1 of the run ended with exit code 3; ")


def test_it_waits_for_as_long_as_all_are_there(others, exits, monkeypatch, capsys):
    monkeypatch.setattr(processes, "ANSWER_TIMEOUT", 0.1)
    one = others(SLEEP)
    one.over = Soon()
    with one:
        time.sleep(0.3)
    assert not exits and capsys.readouterr().err == ""


def test_of_other_processes_only_libraries_reach_the_terminal(capfd):
    with quiet():
        print("from Python")
        print("from Python", file=sys.stderr)
        os.write(2, b"from a library\n")
    print("afterwards")
    assert capfd.readouterr() == ("afterwards\n", "from a library\n")


def test_their_errors_give_the_first_time_to_tell_them(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    begun, stderr = time.monotonic(), sys.stderr
    with pytest.raises(ConnectionError), quiet():
        raise ConnectionError
    assert time.monotonic() - begun >= 0.2 and sys.stderr is stderr
    monkeypatch.setattr(processes, "PATIENCE", HUNG)
    with pytest.raises(Stopped), quiet():
        raise Stopped(signal.SIGTERM)
    assert time.monotonic() - begun < HUNG


@pytest.mark.parametrize(("file", "spec", "argv", "can"), [
    ("train.py", None, ["python", "train.py", "--devices", "2"], True),
    ("train.py", None, ["python", "-u", "../here/train.py"], True),
    ("src/train.py", "a spec", ["python", "-m", "src.train"], True),  # which is found again by its name
    ("kernel.py", None, ["python", "other.py"], False),
    (None, None, ["python"], False),
    (None, "a spec", ["python", "-m", "src.train"], False),
])
def test_only_what_runs_the_same_again_starts_others(config, monkeypatch, tmp_path, file, spec, argv, can):
    (tmp_path / "here" / "src").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    for name in ("train.py", "src/train.py", "kernel.py", "other.py"):
        Path(name).touch()
    main = {name: value for name, value in {"__file__": file, "__spec__": spec}.items() if value}
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(**main))
    monkeypatch.setattr(sys, "orig_argv", argv)
    if can:
        check_can_start_others(config(devices=2))
    else:
        with pytest.raises(UserError, match="--devices 2: "):
            check_can_start_others(config(devices=2))


@pytest.mark.parametrize(("cores", "flags", "variables", "each"), [
    (8, {"devices": 2}, {}, 4), (8, {"devices": 3}, {}, 2), (2, {"devices": 4}, {}, 1), (8, {"devices": 1}, {}, 8),
    (8, {"devices": 2}, {"OMP_NUM_THREADS": "8"}, 8), (8, {"devices": 2, "accelerator": "gpu"}, {}, 8),
])
def test_on_a_cpu_the_processes_share_its_cores(config, monkeypatch, cores, flags, variables, each):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cores)
        share_cores(config(**flags))
        assert torch.get_num_threads() == each
    finally:
        torch.set_num_threads(before)
