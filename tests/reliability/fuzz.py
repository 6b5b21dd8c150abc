"""Damaged files by the thousand through one reader: each must be refused in one line that names it, or read as something valid.

`python -m tests.reliability.fuzz FOLDER READER NUMBER` makes input NUMBER again and reads it, with a traceback where there is
one. FOLDER is where valid files are made at the first call; the input stays below it.
"""

import faulthandler
import json
import mmap
import os
import re
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from src.errors import UserError
from tests.reliability.mutate import Mutation

SEED = 1
SLOWEST = 5.0  # seconds of the processor's time for one small file
ROOM = 3 << 29  # bytes that reading it may take
ENDED = {signal.SIGPROF: f"takes over {SLOWEST:.0f} s", signal.SIGALRM: "hangs"}


class Reader(NamedTuple):
    """A reader and the valid files that its damaged ones are made of."""

    target: str  # name of the file that is damaged
    valid: Sequence[bytes]  # its contents
    read: Callable[[Path], None]  # of that file; raises UserError, AssertionError where what it read is not valid
    mutations: tuple[Mutation, ...]
    beside: dict[str, bytes] = {}  # noqa: RUF012 (not changed): what else stands in the folder, by name
    grows: bool = False  # a refusal may cut off what a broken-off write left


class Finding(NamedTuple):
    what: str
    number: int  # of the input


def damaged(reader: Reader, number: int) -> bytes:
    """Input `number`; number 0 is the first valid file as it is."""
    if number == 0:
        return reader.valid[0]
    draw = Random(f"{SEED} {reader.target} {number}")
    data, other = draw.choice(reader.valid), draw.choice(reader.valid)
    return draw.choice(reader.mutations)(data, other, draw)


def lay_out(reader: Reader, folder: Path, number: int) -> Path:
    for name, content in {**reader.beside, reader.target: damaged(reader, number)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / reader.target


def fuzz(reader: Reader, numbers: Sequence[int], folder: Path) -> list[Finding]:
    """Read all these inputs, in forked processes, so that a crash or a hang is a finding and not the end."""
    done, found_file = mmap.mmap(-1, 8), folder / "findings"
    found_file.write_text("")
    ended, left = [], list(numbers)
    while left:
        child = os.fork()
        if not child:
            _read_all(reader, left, folder, done, found_file)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        place = struct.unpack("q", done[:8])[0]
        if status == 0:
            break
        ended.append(Finding(ENDED.get(-status, f"the process ends with status {status}"), left[place]))
        left = left[place + 1:]
    return ended + [Finding(*json.loads(line)) for line in found_file.read_text().splitlines()]


def in_words(findings: list[Finding]) -> str:
    """The kinds of findings, the most frequent first, each with an input that shows it."""
    kinds: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        place, _, message = finding.what.partition(": ")
        kinds.setdefault((place, *re.sub(r"\d+", "", message).split()[:3]), []).append(finding)
    return "\n".join(f"{len(alike)} x, such as input {alike[0].number}: {alike[0].what[:300]}"
                     for alike in sorted(kinds.values(), key=len, reverse=True))


def _read_all(reader: Reader, numbers: list[int], folder: Path, done: mmap.mmap, found_file: Path) -> None:
    """In the forked process; never returns."""
    torch.set_num_threads(1)
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    here = os.path.join(folder, "input")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with found_file.open("a") as findings:
        for place, number in enumerate(numbers):
            done[:8] = struct.pack("q", place)
            what = read_one(reader, Path(here), number)
            if what is not None:
                findings.write(json.dumps([what, number]) + "\n")
                findings.flush()
    os._exit(0)


def read_one(reader: Reader, folder: Path, number: int) -> str | None:
    """What is wrong with how the reader takes an input; None where nothing is."""
    path = lay_out(reader, folder, number)
    before = _contents(folder)
    signal.setitimer(signal.ITIMER_PROF, SLOWEST)
    signal.setitimer(signal.ITIMER_REAL, 20 * SLOWEST)
    try:
        reader.read(path)
    except UserError as error:
        return _told_well(str(error), path, folder, reader) or _touched(reader, before, folder)
    except BaseException as error:
        return _where(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name in _contents(folder).keys() - {reader.target, *reader.beside}:
            (folder / name).unlink()
    return None


def _told_well(message: str, path: Path, folder: Path, reader: Reader) -> str | None:
    if not any(name in message for name in (path.name, str(folder), *reader.beside)):
        return f"names no file: {message[:200]}"
    if "\n" in message.strip():
        return f"several lines: {message[:300]!r}"
    return f"{len(message)} characters long: {message[:200]!r}" if len(message) > 2000 else None


def _touched(reader: Reader, before: dict[str, bytes], folder: Path) -> str | None:
    after = _contents(folder)
    if reader.grows and before[reader.target].startswith(after.get(reader.target, b"?")):
        before, after = ({name: data for name, data in files.items() if name != reader.target} for files in (before, after))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return f"refused, and yet {changed} changed" if changed else None


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/src/" in frame.filename and "site-packages" not in frame.filename] or frames
    place = f"{ours[-1].filename.rpartition('/src/')[2]}:{ours[-1].lineno}, {ours[-1].name}"
    return f"{type(error).__name__} from {place}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    from tests.reliability.readers import make_readers

    torch.set_num_threads(1)
    base, name, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    reader = make_readers(base)[name]
    place = lay_out(reader, base / "input", number)
    print(place)
    reader.read(place)
