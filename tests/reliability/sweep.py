"""Every flag of every script with values that nobody should give, and some that people do give."""

import argparse
import importlib
import os
import re
from pathlib import Path
from signal import SIGINT

from tests.reliability.jobs import Job, clear, names
from tests.reliability.kills import signalled_well
from tests.reliability.warm import HANGS, Outcome, Run

VALUES = ("", " ", "nan", "inf", "-inf", "-1", "-0", "0", "1", "1.0", "1_0", "0x10", "True", "1000000000000", "1" + "0" * 30,
          "9" * 5000, "1e308", "1e-320", "٣", "１", "\udcff", "é", "/", ".", "../..", "/dev/null", "no/such/file", "file.json",
          "[/y]", "\x1b[2J", "a\nb", "%s", "{}", "--seed", "x" * 5000)
# What takes minutes, starts as many processes as it says, or asks a server, and is tried elsewhere.
ELSEWHERE = {"--compile": ("1", "１"), "--devices": ("1000000000000", "1" + "0" * 30, "1_0", "٣"), "--wandb": VALUES[1:]}
# A flag may ask for a job of days; that one has to end well when it is interrupted after so many seconds.
LONG = 6.0
# A job that had begun: what it has written until then is good.
BEGUN = re.compile("not finite|memory is full")
OUTPUTS = ("--output_csv", "--output_save", "--output", "--output_json", "--proj_dir")


class _Caught(Exception):
    pass


def flags(script: str) -> list[str]:
    """All flags that a script has, as its parser says."""

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Caught(parser)

    kept = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = catch
    try:
        importlib.import_module(script).main([])
    except _Caught as caught:
        named = {flag for action in caught.args[0]._actions for flag in action.option_strings}
        return sorted(flag for flag in named if flag.startswith("--") and flag != "--help")
    finally:
        argparse.ArgumentParser.parse_known_args = kept
    raise AssertionError(f"{script}.py has parsed nothing")


def values(flag: str) -> list[str]:
    return [value for value in VALUES if value not in ELSEWHERE.get(flag, ())]


def try_value(run: Run, job: Job, flag: str, value: str, elsewhere: Path) -> list[str]:
    """Run a job with one flag set so; what is not as it must be, in words.

    Args:
        elsewhere: the folder that the script is run in, in which only outputs may appear.
    """
    clear(job)
    for path in sorted(elsewhere.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    before = _inputs(job)
    words = [*job.words(**{flag.removeprefix("--"): None}), f"{flag}={value}"]
    done = run(job.script, words, signal=[SIGINT, LONG], cwd=str(elsewhere), limit=4 * LONG)
    wrong = _ended_well(done)
    if done.status == 2 and not BEGUN.search(done.err):
        wrong += [f"refused, and yet {name} was written" for name in sorted(names(job.out) | names(elsewhere))]
    if done.status != 2 and flag not in OUTPUTS:
        wrong += [f"{name} was written where it was run" for name in sorted(names(elsewhere))]
    if _inputs(job) != before:
        wrong.append("its inputs changed")
    return [f"{job.script}.py {flag}={value[:40]!r}: {line}" for line in wrong]


def _ended_well(done: Outcome) -> list[str]:
    if done.status == HANGS:
        return ["does not end when it is interrupted"]
    if done.status == 128 + SIGINT:
        return signalled_well(done, SIGINT)
    last = (done.err.splitlines() or [""])[-1]
    well = done.status == 0 or (done.status == 2 and last.startswith("error: ") and done.err.count("error: ") == 1)
    wrong = [] if well and "Traceback" not in done.err else [f"status {done.status}, {done.err[-300:]!r}"]
    if len(last) > 15_000:  # a value of 5000 characters may be repeated
        wrong.append(f"a line of {len(last)} characters")
    return wrong + (["a control character in what it says"] if "\x1b" in done.err + done.out else [])


def _inputs(job: Job) -> dict[str, tuple[int, int]]:
    folder = job.out.parent / "inputs"
    return {entry.name: (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(folder)}
