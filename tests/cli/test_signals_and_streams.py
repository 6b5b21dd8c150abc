"""The scripts as processes that are signalled, also while they import, and whose streams nobody reads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import SCRIPTS, check_told, words_of

ROOT = Path(__file__).parents[2]
HUNG = 900.0  # seconds after which a process will not end any more, however busy the machine
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def start(script: str, flags: dict[str, str], **named) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *words_of(flags)], text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **named)


def wait_until_caught(process: subprocess.Popen, number: int) -> None:
    """Until the script has its handler, which it sets before it imports anything heavy."""
    end = time.monotonic() + HUNG
    while time.monotonic() < end:
        caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> number - 1 & 1 and (number != signal.SIGINT or int(caught.split()[1], 16) >> 14 & 1):
            return
        time.sleep(0.001)
    raise AssertionError("the script sets no handler")


@needs_proc
@pytest.mark.parametrize(("script", "number", "later"), [
    ("train", signal.SIGINT, 0.0), ("merge", signal.SIGTERM, 0.3),
    *(pytest.param(script, number, later, marks=pytest.mark.slow) for script in SCRIPTS for number in SIGNALS
      for later in (0.0, 0.5, 1.0, 1.5))])
def test_a_signal_in_the_first_seconds_is_one_line(good, tmp_path, script, number, later):
    process = start(script, good(script), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    wait_until_caught(process, number)
    time.sleep(later)
    process.send_signal(number)
    err = process.communicate(timeout=HUNG)[1]
    if later and process.returncode in (0, -number):
        pytest.skip("it had ended before, or just")
    assert process.returncode == 128 + number, err
    what = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    assert err.endswith(f"error: {what}; what was finished is saved\n") and err.count("error") == 1 and "Traceback" not in err


SWALLOWS = """
import os, signal, time
from src.cli.run import run

def main(arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except:
        {then}
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.01)
    print("never reached")

run(main)
"""


@pytest.mark.parametrize("then", ["pass", "raise ImportError('half of a package')", "time.sleep(1.5); print('cleaned'); raise"])
def test_a_signal_that_is_swallowed_comes_again_but_not_into_its_own_cleaning(then):
    process = subprocess.run([sys.executable, "-c", SWALLOWS.format(then=then)], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 128 + signal.SIGTERM, process.stderr
    assert process.stderr == "error: ended by SIGTERM; what was finished is saved\n"
    assert process.stdout == ("cleaned\n" if "cleaned" in then else "")


@pytest.mark.parametrize(("later", "code", "said"), [
    (0.0, 128 + signal.SIGTERM, "error: ended by SIGTERM; what was finished is saved\n"), (1.2, -signal.SIGTERM, "")])
def test_a_second_signal_ends_the_process_at_once_where_it_is_not_the_same_one(later, code, said):
    """What the terminal sends to all processes a launcher passes on once more."""
    program = SWALLOWS.format(then=f"time.sleep({later}); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); raise")
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HUNG)
    assert process.returncode == code and process.stderr == said


@pytest.mark.slow
@needs_proc
def test_a_signal_that_is_ignored_from_the_start_stays_ignored(good, tmp_path):
    """nohup ignores SIGHUP."""
    process = start("merge", good("merge"), stderr=subprocess.PIPE,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_until_caught(process, signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=HUNG)
    assert process.returncode == 0 and (tmp_path / "out" / "o.pth").exists()


def closed(*numbers: int):
    """For a child: these streams closed, as by `2>&-`."""
    return lambda: [os.close(number) for number in numbers]


@pytest.mark.parametrize("numbers", [(0, 1, 2), *(pytest.param(one, marks=pytest.mark.slow) for one in ((1,), (2,)))])
def test_closed_streams_are_no_ones_file(call, good, tmp_path, numbers):
    """The next file opened would get the number 2, and a library's warning would go into it."""
    process = start("merge", good("merge"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=closed(*numbers))
    out, _ = process.communicate(timeout=HUNG)
    assert process.returncode == 0 and not out
    assert call("merge", words_of(good("merge") | {"--output": str(tmp_path / "again.pth")}))[0] == 0
    assert (tmp_path / "out" / "o.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()


def test_an_error_without_a_stderr_is_not_said_on_stdout(good, tmp_path):
    process = start("merge", good("merge") | {"--adapter": "none"}, stdout=subprocess.PIPE, preexec_fn=closed(2))
    assert not process.communicate(timeout=HUNG)[0] and process.returncode == 2


@pytest.mark.parametrize("script", ["evaluate", pytest.param("train", marks=pytest.mark.slow), pytest.param(
    "rlhf_dpo_generate_save", marks=pytest.mark.slow), pytest.param("rlhf_generate_reject_csv", marks=pytest.mark.slow)])
def test_nobody_reads_what_is_printed(good, tmp_path, script):
    """`2>&1 | head -1` ends its reader after a line; what is computed is not lost by it."""
    read, write = os.pipe()
    process = start(script, good(script), stdout=write, stderr=write)
    os.close(read)
    os.close(write)
    assert process.wait(HUNG) == 0
    name = {"evaluate": "o.json", "train": "run/rwkv-final.safetensors", "rlhf_dpo_generate_save": "o.save",
            "rlhf_generate_reject_csv": "o.csv"}[script]
    assert (tmp_path / "out" / name).exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_log_on_a_full_disk_costs_no_work(good, tmp_path):
    with open("/dev/full", "w") as full:
        process = start("train", good("train"), stdout=full, stderr=full)
        assert process.wait(HUNG) == 0
    assert (tmp_path / "out" / "run" / "rwkv-final.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_result_that_finds_no_room_is_an_error(good, tmp_path):
    flags = good("rlhf_dpo_generate_save") | {"--check_data": "1"}
    with open("/dev/full", "w") as full:
        process = start("rlhf_dpo_generate_save", flags, stdout=full, stderr=subprocess.PIPE)
        err = process.communicate(timeout=HUNG)[1]
    assert process.returncode == 2 and "error: the output on stdout could not be written (No space left on device)" in err


@pytest.mark.slow
def test_a_terminal_of_another_encoding(good, tmp_path):
    """A histogram of blocks in Latin-1."""
    flags = good("rlhf_dpo_generate_save") | {"--check_data": "1"}
    process = subprocess.run([sys.executable, str(ROOT / "rlhf_dpo_generate_save.py"), *words_of(flags)], capture_output=True,
                             env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert process.returncode == 0, process.stderr
    assert rb"\u2588" in process.stderr and process.stdout.startswith(b"{")


def test_escapes_in_a_name_do_not_reach_the_terminal(call, good, tmp_path):
    name = tmp_path / "a\x1b]0;b\x07\nc\u202e[/y].save"
    code, err = call("evaluate", words_of(good("evaluate") | {"--pairs": str(name)}))
    check_told(code, err, (r"a\x1b]0;b\x07 c\u202e[/y].save", "does not exist"))
