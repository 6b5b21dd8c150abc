"""Runs that are broken off, and what must hold then: nothing that was whole is lost, and the same command gives what an unbroken
run gives. Each trial returns what did not hold, in words; an empty list where all did."""

import errno
import json
import random
import re
import signal
import subprocess
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tests.reliability.jobs import Job, artifacts, clear, earlier_result, names
from tests.reliability.warm import ENDED_BY, HANGS, Outcome, Run

# As in faults.c.
COUNT, KILL_BEFORE, KILL_AFTER, TEAR, FAIL, FILL, SIGNAL = range(7)
ACTIONS = ("count", "kill before", "kill after", "kill halfway through", "fail", "the disk is full from", "a signal at")
WITH_A_PATH = ("open", "rename", "unlink", "mkdir", "chmod")
# Of more equal calls in a row than this, the first two, the last and a seeded one are tried.
MOST_ALIKE = 4
# What grows as a run goes on; all other files are whole at any moment.
GROWING = (".csv", ".jsonl", ".partial")
# What a killed process leaves where nobody holds the folder: another process may be writing it, for all that can be told.
TEMPORARY = re.compile(r"\.tmp$|\.partial$|\.lock$|^\.|/\.")


class Reference(NamedTuple):
    """An unbroken run: what it left, how long it took, and the calls that changed files, in order."""

    artifacts: dict[str, Any]
    names: set[str]
    seconds: float
    calls: list[tuple[str, str]]  # kind and path


class Point(NamedTuple):
    """What is to happen at one call."""

    call: int
    action: int
    error: int = 0  # or the signal's number

    def fault(self, folder: Path, log: Path | None = None) -> list[Any]:
        return [str(folder), self.call, self.action, self.error, str(log or "")]


def build_faults(folder: Path) -> Path:
    """The library of faults.c."""
    library = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def unbroken(run: Run, job: Job, folder: Path) -> Reference:
    clear(job)
    earlier_result(job)
    done = run(job.script, job.words(), fault=Point(0, COUNT).fault(job.out, folder / "calls"))
    assert done.status == 0, done.err
    calls = [tuple(line.split(" ", 1)) for line in (folder / "calls").read_text().splitlines()]
    return Reference(artifacts(job.out), names(job.out), done.seconds, calls)


def points(reference: Reference, seed: int, actions: tuple[int, ...]) -> list[Point]:
    """All that can happen at all calls that differ, in their order."""
    found, draw, first = [], random.Random(seed), 1
    for (kind, _), alike in groupby(reference.calls, key=_kind_and_name):
        count = len(list(alike))
        calls = range(first, first + count)
        if count > MOST_ALIKE:
            calls = sorted({first, first + 1, first + count - 1, draw.randrange(first, first + count)})
        first += count
        for call in calls:
            found += [point for action in actions for point in _at(call, kind, action)]
    return found


def _kind_and_name(call: tuple[str, str]) -> tuple[str, str]:
    """Without what mkstemp draws."""
    kind, path = call
    return kind, re.sub(r"\.[a-z0-9_]{8}\.tmp$", ".tmp", path)


def _at(call: int, kind: str, action: int) -> list[Point]:
    if action == TEAR:
        return [Point(call, TEAR)] if kind == "write" else []
    if action == FILL:
        return [Point(call, FILL, errno.ENOSPC)] if kind in ("open", "write", "mkdir") else []
    if action == SIGNAL:
        return [Point(call, SIGNAL, ENDED_BY[call % len(ENDED_BY)])]
    if action == FAIL:
        refused = [Point(call, FAIL, errno.EACCES)] if kind in WITH_A_PATH else []
        return [Point(call, FAIL, errno.ENOLCK if kind == "flock" else errno.EIO), *refused]
    return [Point(call, action)]


def told(point: Point, reference: Reference) -> str:
    kind, path = reference.calls[point.call - 1]
    error = ""
    if point.error:
        error = f" with {signal.Signals(point.error).name if point.action == SIGNAL else errno.errorcode[point.error]}"
    return f"{ACTIONS[point.action]} call {point.call}, {kind} {Path(path).name}{error}"


def at_point(run: Run, job: Job, reference: Reference, point: Point, **how: Any) -> list[str]:
    """Break a run off at a call, then give the same command again."""
    before = _anew(job)
    first = run(job.script, job.words(), fault=point.fault(job.out), **how)
    if point.action == SIGNAL:
        # In the moment between a file's making and the note that it is there, nobody is to remove it.
        made = reference.calls[point.call - 1][0] == "open"
        wrong = [line for line in _stopped_well(first, job, reference, point.error)
                 if not (made and line.startswith("left "))]
    elif point.action in (FAIL, FILL):
        kind = reference.calls[point.call - 1][0]
        wrong = _failed_well(first, job, reference, leaves_temporaries=kind == "unlink")
    else:
        wrong = [] if first.status == -signal.SIGKILL else [f"was not killed: status {first.status}"]
    wrong += _whole(job, reference, before) + again(run, job, reference, **how)
    return [f"{job.script}, {told(point, reference)}: {line}" for line in wrong]


def at_moment(run: Run, job: Job, reference: Reference, number: int, seconds: float, begin: Run | None = None) -> list[str]:
    """Send a signal so many seconds after the start, then give the same command again.

    Args:
        begin: starts the run that is broken off, where that is not `run`.
    """
    before = _anew(job)
    first = (begin or run)(job.script, job.words(), signal=[number, seconds])
    wrong = []
    if first.status == -number and (number == signal.SIGKILL or artifacts(job.out) == reference.artifacts):
        pass  # a script whose work is done ends by a signal as any process does
    elif first.status:
        wrong = _stopped_well(first, job, reference, number)
    wrong += _whole(job, reference, before) + again(run, job, reference)
    return [f"{job.script}, {signal.Signals(number).name} after {seconds:.3f} s: {line}" for line in wrong]


def again(run: Run, job: Job, reference: Reference, **how: Any) -> list[str]:
    """Give the command again: it must end well and leave what an unbroken run leaves, and nothing else."""
    second = run(job.script, job.words_again(), **how)
    if second.status:
        return [f"the same command again: status {second.status}, {second.err[-300:]!r}"]
    found = names(job.out)
    wrong = [f"again: left {name}" for name in sorted(found - reference.names)]
    wrong += [f"again: lacks {name}" for name in sorted(reference.names - found)]
    left = artifacts(job.out)
    return wrong + [f"again: {name} differs from an unbroken run's" for name, content in reference.artifacts.items()
                    if name in left and left[name] != content]


def _stopped_well(done: Outcome, job: Job, reference: Reference, number: int) -> list[str]:
    return signalled_well(done, number) + [
        f"left {name}" for name in _left(job, reference) if not name.endswith(".partial")]


def signalled_well(done: Outcome, number: int) -> list[str]:
    """One line and exit code 128 + n."""
    last = (done.err.splitlines() or [""])[-1]
    word = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    if done.status == 128 + number and last.startswith(f"error: {word}") and _one_error(done.err):
        return []
    return [f"status {done.status}, {done.err[-400:]!r}"]


def _failed_well(done: Outcome, job: Job, reference: Reference, leaves_temporaries: bool) -> list[str]:
    """Exit code 2, one line that names a file, no temporary; or the work done as if the call had not failed."""
    if done.status == 0:
        left, told = artifacts(job.out), [line for line in done.err.splitlines() if line.startswith("warning: ")]
        return [f"says that all went well, but {name} differs" for name, content in reference.artifacts.items()
                if left.get(name) != content and not any(name in line for line in told)]
    last = (done.err.splitlines() or [""])[-1]
    wrong = []
    if done.status != 2 or not last.startswith("error: ") or not _one_error(done.err):
        wrong.append("hangs" if done.status == HANGS else f"status {done.status}, {done.err[-300:]!r}")
    elif str(job.out) not in last:
        wrong.append(f"names no file: {last}")
    if not leaves_temporaries:
        wrong += [f"left {name}" for name in _left(job, reference) if not name.endswith(".partial")]
    return wrong


def _one_error(err: str) -> bool:
    return err.count("error: ") == 1 and "Traceback" not in err and "Exception ignored" not in err


def _left(job: Job, reference: Reference) -> list[str]:
    return sorted(name for name in names(job.out) - reference.names if TEMPORARY.search(name))


def _anew(job: Job) -> dict[Path, bytes]:
    clear(job)
    return earlier_result(job)


def _whole(job: Job, reference: Reference, before: dict[Path, bytes]) -> list[str]:
    """Each file that must be whole at any moment is the earlier one, or complete; each that grows is the beginning of it."""
    wrong = [f"{path.name}, which stood there before, is gone" for path in before if not path.exists()]
    for name, content in reference.artifacts.items():
        path = job.out / name
        if not path.exists() or not isinstance(content, bytes) or path.suffix in (".png", ".html"):
            continue
        data = path.read_bytes()
        good = content.startswith(data) if path.suffix in GROWING else data in (content, before.get(path))
        wrong += [] if good else [f"{name} is neither whole nor as it was"]
    for path in job.out.rglob("*.json"):
        if path not in before:
            wrong += [] if _is_json(path) else [f"{path.name} is torn"]
    return wrong


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
