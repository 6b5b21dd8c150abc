"""Everything that a GPU changes, checked and measured on this machine: what `make gpu` runs.

    make gpu                                  # all of it, some eight minutes on an H100
    make gpu ONLY="build kernels runs"        # some of it; --list 1 prints the names

Each check is a process of its own with a time limit of its own, so that one that hangs costs only itself. What must be right is
checked side by side, since it leaves most of a GPU idle; what is timed then runs alone. Prints a table and writes it to
benchmarks/results/checks_gpu.json as it is done, beside the figures of each benchmark; output goes to out/gpu/NAME.log.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from results import ROOT, read_results, write_results
from rich.console import Console
from rich.table import Table

LOGS = ROOT / "out" / "gpu"
PASSED = "passed"
# Seconds between two lines that say what still runs, and characters of a failure's output that are printed.
LINE_EVERY, FAILURE = 15.0, 2500
# Checks at once, and of each the processes and their threads, so that they don't take the processor from each other.
SIDE_BY_SIDE, WORKERS, THREADS = 16, 3, "1"
BUILD = """
import torch
from src import kernels
from src.kernels.toolkit import architectures, find_toolkit
print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda, find_toolkit(), architectures())
raise SystemExit(kernels.missing("cuda") or 0)
"""


class Check(NamedTuple):
    name: str
    command: list[str]
    limit: int  # seconds
    printed: bool = False  # what it prints where it passes
    shown: bool = False  # what it prints, in the results


def pytest(file: str, *only: str) -> list[str]:
    """Where pytest-xdist is installed, by several processes."""
    several = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", f"tests/gpu/{file}", "-q", "-p", "no:cacheprovider", "--tb=short", *several, *only]


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, f"benchmarks/{name}.py", *arguments]


def step(size: str, *arguments: str) -> list[str]:
    return script("gpu/dpo_step", "--size", size, *arguments)


def sanitizer(tool: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=wkv", "--error-exitcode", "1",
            *script("gpu/sanitized")]


PEERS = script("wkv", "--versions", "v7", "--shape", "8", "4096", "64", "64")
FIRST = [
    Check("card", ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"],
          30, True, True),
    Check("build", [sys.executable, "-c", BUILD], 240, True, True),
]
TOGETHER = [
    Check("kernels", pytest("test_kernels_on_a_gpu.py"), 120),
    Check("memcheck", sanitizer("memcheck"), 120),
    Check("racecheck", sanitizer("racecheck"), 120),
    Check("generation", pytest("test_generation_on_a_gpu.py"), 150),
    Check("quantized", pytest("test_quantization_on_a_gpu.py"), 120),
    Check("logits", pytest("test_on_a_gpu.py", "-k", "logits"), 90),
    Check("runs", pytest("test_on_a_gpu.py", "-k", "not logits and not deepspeed"), 150),
    Check("deepspeed", pytest("test_on_a_gpu.py", "-k", "deepspeed"), 180),
    Check("commands", pytest("test_commands_on_a_gpu.py"), 180),
    # Compilers keep what they make here, for the timed runs below.
    Check("compile", step("1.5B", "--compile", "1", "--keep", "0"), 150),
    Check("compile-peers", [*PEERS, "--rounds", "1", "--keep", "0"], 120),
]
ALONE = [
    Check("steps-1.5B", step("1.5B", "--tokens", "4096", "4096", "2048", "--grad_cp", "0", "1", "1"), 90, True),
    Check("steps-7.2B", step("7.2B", "--tokens", "2048", "--grad_cp", "1"), 60, True),
    Check("steps-compile", step("1.5B", "--compile", "1"), 120, True),
    Check("writing-1.5B", script("gpu/writing", "--size", "1.5B"), 90, True),
    Check("writing-7.2B", script("gpu/writing", "--size", "7.2B"), 120, True),
    Check("step-kernels", script("gpu/wkv_step"), 45, True),
    Check("recurrence", script("wkv", "--peers", "0"), 60, True),
    Check("ncu", ["ncu", "--clock-control", "none", "--kernel-name", "regex:step", "--section", "SpeedOfLight",
                  *script("gpu/wkv_step", "--once", "1")], 60, True, True),
    Check("recurrence-peers", [*PEERS, "--name", "peers"], 60, True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of checks; all where not given")
    parser.add_argument("--limit", type=int, default=600, help="seconds that no check takes longer than")
    parser.add_argument("--list", type=int, choices=(0, 1), default=0, help="1: print the names and stop")
    options = parser.parse_args()
    every = [*FIRST, *TOGETHER, *ALONE]
    if options.list:
        print("\n".join(f"{check.name}, at most {check.limit} s" for check in every))
        return
    if not gpu_found():
        parser.error("torch finds no GPU here, and nothing else is checked by this; make test checks the rest")
    if unknown := set(options.only) - {check.name for check in every}:
        parser.error(f"no check is called {', '.join(sorted(unknown))}; --list 1 prints their names")
    chosen = [check for check in every if not options.only or check.name in options.only]
    LOGS.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    for group, at_once in ((FIRST, 1), (TOGETHER, SIDE_BY_SIDE), (ALONE, 1)):
        threads = {"OMP_NUM_THREADS": THREADS} if at_once > 1 else {}
        with ThreadPoolExecutor(at_once) as pool:
            waiting = {pool.submit(run, check, min(check.limit, options.limit), threads): check
                       for check in group if check in chosen}
            while waiting:
                for future in wait(waiting, LINE_EVERY, FIRST_COMPLETED).done:
                    check = waiting.pop(future)
                    results[check.name] = future.result()
                    save(results)
                    show(check, results[check.name])
                if waiting:
                    left = len(chosen) - len(results)
                    print(f"{left} of {len(chosen)} checks left: {', '.join(check.name for check in waiting.values())}",
                          file=sys.stderr, flush=True)
        if group is FIRST and results.get("build", {}).get("result", PASSED) != PASSED:
            break  # the rest would only repeat it
    table = Table("check", "s", "", "")
    for check in chosen:
        if found := results.get(check.name):
            table.add_row(check.name, f"{found['seconds']:.0f}", found["result"], found["last_line"])
    Console(width=130).print(table)
    raise SystemExit(any(found["result"] != PASSED for found in results.values()))


def gpu_found() -> bool:
    return not subprocess.run([sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]).returncode


def run(check: Check, limit: int, variables: dict[str, str]) -> dict[str, Any]:
    """Its output to a log, its process group killed at the limit."""
    started, path = time.monotonic(), os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log_of(check).open("w") as output:
        try:
            process = subprocess.Popen(check.command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                       env=os.environ | variables | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path})
            code = process.wait(limit)
            result = PASSED if code == 0 else f"failed ({code})"
        except FileNotFoundError:
            result = f"not run: no {check.command[0]} here"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"stopped after {limit} s"
    lines = [line.strip() for line in log_of(check).read_text(errors="replace").splitlines() if line.strip()]
    return {"result": result, "when": time.strftime("%F %R UTC", time.gmtime()), "seconds": round(time.monotonic() - started, 1),
            "last_line": lines[-1][:80] if lines else "", "output": lines if check.shown else []}


def log_of(check: Check) -> Path:
    return LOGS / f"{check.name}.log"


def save(results: dict[str, dict[str, Any]]) -> None:
    """Beside the last results of other checks."""
    found = read_results("checks", card())
    write_results("checks", found | {"checks": found.get("checks", {}) | results})


@cache
def card() -> str:
    """The first card's name."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] if shutil.which(command[0]) else ""


def show(check: Check, found: dict[str, Any]) -> None:
    print(f"== {check.name}: {found['result']}, {found['seconds']:.0f} s")
    text = log_of(check).read_text(errors="replace")
    if found["result"] != PASSED:
        print(text[-FAILURE:])
    elif check.printed:
        print(text.rstrip())
    sys.stdout.flush()


if __name__ == "__main__":
    main()
