"""A process that has imported everything, and from which each run of a script is forked: tens of runs where one would start.

`python -m tests.reliability.warm` reads a request a line from stdin, {"script", "arguments", "stdout", "stderr", ...}, and
answers each with {"status", "seconds"}, the former as `subprocess` has it: an exit code, or the signal that ended it as a
negative number. A request may hold "fault", the arguments of `fault_arm` (faults.c), "signal": [number, seconds after the
start], "cwd", the folder to run in, "sabotage", a fault to be put in (sabotage.py), "room", bytes that it may take
beyond what it begins with, "largest_file", bytes that the system lets it write into one file, as a full disk would, and
"limit", seconds after which it is ended as one that hangs.
"""

import atexit
import ctypes
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIG_BLOCK, SIG_UNBLOCK, SIGHUP, SIGINT, SIGKILL, SIGTERM, pthread_sigmask
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
SCRIPTS = ("rlhf_generate_reject_csv", "rlhf_dpo_generate_save", "train", "merge", "evaluate")
# What the scripts import when they have read their flags, or where they need it.
LATE = ("src.cli.generate", "src.cli.prepare", "src.cli.train", "src.cli.merge", "src.cli.evaluate", "src.generation.reject",
        "src.preference.prepare", "src.training.run", "src.evaluation.evaluate", "src.generation.greedy", "matplotlib.pyplot",
        "matplotlib.backends.backend_agg", "pyarrow", "pyarrow.parquet", "pyarrow.ipc", "safetensors.torch", "tokenizers")
# Seconds in which any tiny run ends, however busy the machine.
HUNG = 120.0
HANGS = -99  # the status of a run that did not
ENDED_BY = (SIGINT, SIGTERM, SIGHUP)


class Outcome(NamedTuple):
    status: int  # exit code; negative: the signal that ended it
    err: str
    out: str
    seconds: float


Run = Callable[..., Outcome]


@contextmanager
def warm(folder: Path, faults: Path | None = None) -> Iterator[Run]:
    """`run(script, arguments, fault=..., signal=..., limit=...)`: a script's run in a process of its own.

    Args:
        folder: where the runs' stdout and stderr go.
        faults: the library made of faults.c, which `fault` needs.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONFAULTHANDLER": ""}
    if faults is not None:
        environment["LD_PRELOAD"] = str(faults)
    process = subprocess.Popen([sys.executable, "-m", "tests.reliability.warm"], cwd=ROOT, env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    streams = {name: folder / name for name in ("stdout", "stderr")}

    def run(script: str, arguments: list[str], **how: Any) -> Outcome:
        request = {"script": script, "arguments": arguments, **{name: str(path) for name, path in streams.items()}, **how}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        out, err = (streams[name].read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
        return Outcome(answer["status"], err, out, answer["seconds"])

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()


def cold(script: str, arguments: list[str], before: tuple[str, ...] = (), signal: tuple[int, float] | None = None) -> Outcome:
    """The same in a process that has yet to import everything, as a user starts it.

    Args:
        before: words between Python and the script.
        signal: its number, and the seconds after which it is sent.
    """
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *before, f"{script}.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        out, err = process.communicate(timeout=signal[1] if signal else HUNG)
    except subprocess.TimeoutExpired:
        process.send_signal(signal[0] if signal else SIGKILL)
        out, err = process.communicate()
    return Outcome(process.returncode, err, out, time.monotonic() - started)


def serve() -> None:
    """Answer requests until stdin ends."""
    import torch

    torch.set_num_threads(1)
    modules = {script: importlib.import_module(script) for script in SCRIPTS}
    for name in LATE:
        importlib.import_module(name)
    importlib.import_module("src.wkv.native").missing("cpu")
    # Drawing is nine tenths of a tiny run. Pictures are written all the same, only with nothing on them.
    importlib.import_module("matplotlib.figure").Figure.savefig = draw_nothing
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        pthread_sigmask(SIG_BLOCK, ENDED_BY)  # until the script is there to take them
        child = os.fork()
        if not child:
            _run(modules[request["script"]].main, request)
        pthread_sigmask(SIG_UNBLOCK, ENDED_BY)
        status = _wait(child, request, started)
        print(json.dumps({"status": status, "seconds": time.monotonic() - started}), flush=True)


def _run(main: Callable, request: dict[str, Any]) -> None:
    """In the forked process: the script's own run; never returns."""
    from src.cli.run import run

    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                                (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    if "room" in request:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + request["room"],) * 2)
    if "largest_file" in request:  # Python ignores SIGXFSZ, so that write() fails with "File too large"
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    os.chdir(request.get("cwd", "."))
    sys.argv = [f"{request['script']}.py", *request["arguments"]]
    if "sabotage" in request:
        importlib.import_module("tests.reliability.sabotage").FAULTS[request["sabotage"]]()
    if "fault" in request:
        folder, call, action, error, log = request["fault"]
        log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if log else -1
        ctypes.CDLL(None).fault_arm(os.fsencode(folder), ctypes.c_long(call), action, error, log)

    def begin(arguments: list[str]) -> None:
        pthread_sigmask(SIG_UNBLOCK, ENDED_BY)
        main(arguments)

    try:
        run(begin)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking a thousand imported modules down takes a second


def draw_nothing(figure: Any, target: Any, format: str, **_: Any) -> None:
    """In place of matplotlib's `Figure.savefig`."""
    target.write("<svg></svg>" if format == "svg" else b"\x89PNG\r\n\x1a\n")


def _wait(child: int, request: dict[str, Any], started: float) -> int:
    """Until the run ends; a signal is sent in time. The child's end is seen at once, since it holds the one end of a pipe."""
    opened = os.pidfd_open(child)
    end = started + request.get("limit", HUNG)
    hangs = False
    try:
        if "signal" in request:
            number, seconds = request["signal"]
            if not select.select([opened], [], [], max(0.0, started + seconds - time.monotonic()))[0]:
                os.kill(child, number)
        if not select.select([opened], [], [], max(0.0, end - time.monotonic()))[0]:
            hangs = True
            os.kill(child, SIGKILL)
    finally:
        os.close(opened)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return HANGS if hangs else status


if __name__ == "__main__":
    serve()
