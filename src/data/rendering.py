"""Renders conversations by an untrusted chat template, as `apply_chat_template` of transformers does, in a child process.

A template is a program. Jinja's sandbox keeps it from Python's objects, but not from running forever or filling the memory, so it
runs in a process that has limits of time and memory (src/data/jinja_worker.py), and whose end costs nothing but its start.
"""

import hashlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import SIGNALS, UserError
from src.files import write_all

SECONDS = 2.0  # of processor time, for a conversation, and for compiling the template
# The same on the clock, on a busy machine.
MOST_SECONDS = 60.0
LONGEST_TEXT = 16 << 20  # characters that a template may make of a conversation, or 100 times its length
LARGEST_JOB = 64 << 20  # bytes of a conversation
# A request: enough jobs that an exchange costs little, few enough for the child's memory.
_BATCH_JOBS, _BATCH_BYTES = 1000, 4 << 20
_PATIENCE = 10.0  # seconds, for the end of a child that has closed its pipe
# Processes that one renderer ends before it gives the template up.
MOST_ENDED = 3
# What the child sees of the environment: how its interpreter is loaded, and the time zone for `strftime_now`.
_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
_WORKER = Path(__file__).with_name("jinja_worker.py")
# The worker's frames; not imported from it, so that Jinja stays out of this process.
_LENGTH = struct.Struct("!Q")
_TEXT, _BEYOND = b"t", b"b"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template's source, from the file `path`, and the special tokens it may name, such as `bos_token`.

    A template that calls `strftime_now` renders differently each day, and its fingerprint stays the same.
    """

    path: str
    source: str
    special_tokens: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the source and the special tokens, in hexadecimal."""
        return hashlib.sha256(_encoded([self.source, sorted(self.special_tokens.items())])).hexdigest()


class Job(NamedTuple):
    """A conversation to render.

    A message is `{"role": ..., "content": ...}`; it may have other keys that the template reads, with any values of JSON.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = False


class Fault(NamedTuple):
    """Why a conversation could not be rendered, as one line."""

    reason: str
    is_limit: bool = False  # whether the template was stopped at a limit


class _Ended(Exception):
    """The child has ended; the message says why."""


class Renderer:
    """A chat template at work: `with Renderer(template) as renderer: texts = renderer.render(jobs)`.

    For one thread. The child starts with the first rendering and ends with the block; it also ends if this process does.
    """

    def __init__(self, template: ChatTemplate, seconds: float = SECONDS):
        """`seconds` of processor time that the template may take for a conversation."""
        self.template, self.seconds = template, seconds
        self._now = time.time()  # one time for all renderings: a conversation must begin with its prompt past midnight too
        self._process: subprocess.Popen | None = None
        self._ended = 0

    def __enter__(self) -> "Renderer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with process:  # closes its pipes, and waits for its end
                process.kill()

    def start(self) -> None:
        """Start the child, if there is none, and compile the template. Raises UserError if that fails."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a signal in between would lose the process
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_WORKER), *_folders()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, bufsize=0, cwd="/", start_new_session=True,
                env={name: os.environ[name] for name in _VARIABLES if name in os.environ})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        setup = {"source": self.template.source, "special_tokens": dict(self.template.special_tokens),
                 "seconds": self.seconds, "longest": LONGEST_TEXT, "now": self._now}
        try:
            self._send(_frame(_encoded(setup)))
            answer = self._receive(LONGEST_TEXT)
        except _Ended as error:
            answer = Fault(str(error))
        if isinstance(answer, Fault):
            self.close()
            raise UserError(f"{self.template.path}: {answer.reason}; correct the template, or choose another")

    def render(self, jobs: Sequence[Job], to_first_fault: bool = False) -> list[str | Fault]:
        """The text of each conversation, or what is wrong with it; with `to_first_fault` none after the first that is wrong.

        Raises UserError if the template can't be compiled.
        """
        results: list[str | Fault] = []
        while len(results) < len(jobs):
            frames = _request(jobs, len(results))
            if self._ended >= MOST_ENDED:
                results += [Fault(f"not rendered, since the template had to be stopped {MOST_ENDED} times", True)] * len(frames)
            elif len(frames[0]) > LARGEST_JOB:
                results.append(Fault(f"it has over {LARGEST_JOB >> 20} MB of text"))
            else:
                results += self._exchange(frames)
            if to_first_fault and any(isinstance(result, Fault) for result in results):
                break
        return results

    def _exchange(self, frames: list[bytes]) -> list[str | Fault]:
        """The results of a request; where the child ended, up to that of the job that ended it."""
        self.start()
        results: list[str | Fault] = []
        try:
            self._send(_LENGTH.pack(len(frames)) + b"".join(frames))
            for frame in frames:
                results.append(self._receive(max(LONGEST_TEXT, 100 * len(frame))))
        except _Ended as error:
            self._ended += 1
            results.append(Fault(str(error), is_limit=True))
        return results

    def _send(self, data: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and the next receipt says how
            write_all(self._process.stdin.fileno(), data)

    def _receive(self, longest: int) -> str | Fault:
        """An answer of up to `longest` characters. Raises _Ended."""
        until = time.monotonic() + MOST_SECONDS
        head = self._read(1 + _LENGTH.size, until)
        length, = _LENGTH.unpack(head[1:])
        if length > 4 * longest:  # bytes
            raise self._end("the template's process sends what it should not")
        text = self._read(length, until).decode("utf-8", "surrogatepass")
        if head[:1] == _BEYOND:  # what follows would take as long
            raise self._end(text)
        return text if head[:1] == _TEXT else Fault(text)

    def _read(self, count: int, until: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor, data = self._process.stdout.fileno(), bytearray()
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while len(data) < count:
            if not ready.poll(max(0, until - time.monotonic()) * 1000):
                raise self._end(f"the template takes over {MOST_SECONDS:g} s")
            piece = os.read(descriptor, min(count - len(data), 1 << 20))
            if not piece:
                raise self._end(None)
            data += piece
        return bytes(data)

    def _end(self, reason: str | None) -> _Ended:
        """End the child; with no reason given, it has ended by itself."""
        process = self._process
        assert process is not None
        if reason is None:
            try:
                code = process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                code = -signal.SIGKILL
            how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            reason = (f"the template takes over {self.seconds:g} s" if code == -signal.SIGPROF
                      else f"the template's process ended ({how})")
        self.close()
        return _Ended(reason)


def _request(jobs: Sequence[Job], first: int) -> list[bytes]:
    """The frames of a request's jobs, from number `first` on; one above LARGEST_JOB is alone."""
    frames: list[bytes] = []
    size = 0
    for job in jobs[first:first + _BATCH_JOBS]:
        frame = _frame(_encoded({"messages": [dict(message) for message in job.messages],
                                 "add_generation_prompt": job.add_generation_prompt}))
        size += len(frame)
        if frames and size > _BATCH_BYTES:
            break
        frames.append(frame)
    return frames


def _encoded(value: Any) -> bytes:
    # With escapes, two halves of a character would be read back as one character.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _frame(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _folders() -> list[str]:
    """Where the child finds Jinja: where this process does."""
    found = {name: find_spec(name) for name in ("jinja2", "markupsafe")}
    for name, spec in found.items():
        if spec is None or spec.origin is None:
            raise UserError(f"{name}: chat templates need this package; install requirements.txt")
    return list(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in found.values() if spec and spec.origin))
