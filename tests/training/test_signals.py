"""train.py as processes of its own: a signal ends all of them with one line, and nothing that is closed ends any."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.outside import lines

ROOT = Path(__file__).parents[2]
HUNG = 900.0  # seconds after which a process will not end any more, however busy the machine
TRAINING = "metrics.jsonl"  # is there once steps are done


@pytest.fixture
def start(material, prepared, tmp_path):
    """`start(**flags)` -> train.py in a session of its own, which would take hours."""
    started = []

    def start(redirect: str = "", **flags: object) -> subprocess.Popen:
        flags = {"load_model": material / "x070.pth", "rlhf_train_file": prepared("x070"), "proj_dir": tmp_path / "run",
                 "accelerator": "cpu", "precision": "fp32", "ctx_len": 512, "lora_r": 4, "epoch_steps": 10**6} | flags
        words = [sys.executable, "train.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
        started.append(subprocess.Popen(["sh", "-c", f'exec "$@" {redirect}', "sh", *words], cwd=ROOT, stderr=subprocess.PIPE,
                                        text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        return started[-1]

    yield start
    for process in started:
        if members(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def members(process: subprocess.Popen) -> list[int]:
    """Processes of its session that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == process.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition) -> None:
    end = time.monotonic() + HUNG
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def ends(process: subprocess.Popen, code: int, last: str) -> None:
    """With one line of an error, and no process left behind."""
    err = process.communicate(timeout=HUNG)[1]
    assert process.returncode == code, err
    assert err.count("error: ") == 1 and err.splitlines()[-1].startswith(last) and "Traceback" not in err, err
    wait_for(lambda: not members(process))


def others(process: subprocess.Popen) -> list[int]:
    return [number for number in members(process) if number != process.pid]


@pytest.mark.parametrize(("number", "to_all", "devices"), [
    pytest.param(signal.SIGTERM, False, 2, marks=pytest.mark.slow), *(pytest.param(*given, marks=pytest.mark.slow) for given in (
        (signal.SIGINT, True, 2), (signal.SIGTERM, True, 2), (signal.SIGHUP, False, 2), (signal.SIGTERM, False, 1),
        (signal.SIGHUP, True, 1)))])
def test_a_signal_ends_every_process_with_one_line_and_a_report(start, tmp_path, number, to_all, devices):
    process = start(devices=devices)
    wait_for(lambda: (tmp_path / "run" / TRAINING).exists() or process.poll() is not None)
    (os.killpg if to_all else os.kill)(process.pid, number)
    ends(process, 128 + number, "error: interrupted" if number == signal.SIGINT else f"error: ended by {number.name}")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", TRAINING, "report.html", "samples.jsonl"]


@pytest.mark.slow
def test_before_the_first_step_too(start, tmp_path):
    process = start(devices=2)
    wait_for(lambda: others(process) or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    ends(process, 130, "error: interrupted")


@pytest.mark.slow
def test_with_the_first_process_the_others_are_gone_while_they_still_import(start, tmp_path):
    process = start(devices=2)
    wait_for(lambda: others(process) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=HUNG)
    wait_for(lambda: not members(process))


@pytest.mark.slow
def test_with_the_first_process_the_others_are_gone(start, tmp_path):
    process = start(devices=2)
    wait_for(lambda: (tmp_path / "run" / TRAINING).exists() or process.poll() is not None)
    assert others(process)
    process.send_signal(signal.SIGKILL)
    assert "Traceback" not in process.communicate(timeout=HUNG)[1]
    wait_for(lambda: not members(process))


@pytest.mark.slow
def test_with_one_of_the_others_the_run_ends_and_says_so(start, tmp_path):
    process = start(devices=2)
    wait_for(lambda: (tmp_path / "run" / TRAINING).exists() or process.poll() is not None)
    os.kill(others(process)[0], signal.SIGKILL)
    ends(process, 2, "error: process 1 of the run ended with SIGKILL")


@pytest.mark.slow
def test_what_stops_every_process_is_told_once(start, tmp_path):
    process = start(devices=2, lr_init=1e6, lr_final=1e6, epoch_steps=8)
    ends(process, 2, "error: step ")


@pytest.mark.slow
@pytest.mark.parametrize("redirect", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_a_stream_that_is_closed_costs_no_epoch(start, tmp_path, redirect):
    process = start(redirect, epoch_steps=2, epoch_count=2, devices=2)
    assert process.communicate(timeout=HUNG)[1] == "" and process.returncode == 0
    assert [line["step"] for line in lines(tmp_path / "run" / TRAINING)] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "rwkv-final.safetensors").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_costs_no_epoch(start, tmp_path):
    process = start(epoch_steps=2, epoch_count=2)
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=HUNG) == 0
    assert [line["step"] for line in lines(tmp_path / "run" / TRAINING)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_wandb_ends_with_the_run(start, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start(wandb="a project")
    wait_for(lambda: (tmp_path / "run" / TRAINING).exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    ends(process, 143, "error: ended by SIGTERM")
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(start, tmp_path, monkeypatch):
    process = start()
    wait_for(lambda: (tmp_path / "run" / TRAINING).exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)  # the report takes longer
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=HUNG) in (-signal.SIGTERM, 143)
