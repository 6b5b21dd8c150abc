"""Renders an untrusted chat template in a process of its own, which `Renderer` (src/data/rendering.py) starts and ends.

Imports only the standard library and Jinja, so that it starts within a tenth of a second; the arguments are the folders that
have Jinja. A frame is its length in 8 bytes, then its bytes; texts are UTF-8 in which half characters pass. stdin has a frame of
JSON with the template, and then requests: a count in 8 bytes, and a frame of JSON for each job. Each frame is answered on stdout
by one byte, `TEXT`, `FAULT`, or `BEYOND` where the template went beyond a limit, and a frame with the text. The system ends this
process where the template takes too much time.

The sandbox keeps a template to texts and numbers. Should it ever leak, the limits of the process are behind it: no file can be
opened or written, and no other process started.
"""

import json
import sys

sys.path += sys.argv[1:]

import encodings.unicode_escape  # noqa: F401 (as below: Jinja uses these later, when no file can be opened)
import pprint  # noqa: F401
import random
import resource
import signal
import struct
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, BinaryIO

import jinja2.constants
import jinja2.debug
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LENGTH = struct.Struct("!Q")
TEXT, FAULT, BEYOND = b"t", b"f", b"b"
MEMORY = 512 << 20  # bytes, beyond what Python and Jinja need
LONGEST_REASON = 300  # characters
# Names that a message's reasoning has; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Refused(TemplateError):
    """The template called `raise_exception`."""


class _Unfit(Exception):
    """The message says what is wrong."""


class _TooLong(_Unfit):
    """The template makes too long a text."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks an answer's tokens; renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body, lineno=line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in a template: only these two, not the methods of the class, which would change any dictionary."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` in a template; refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, which may be a keyword
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name!r}, since it begins with an underscore")


def _raise_exception(message: Any) -> None:
    raise Refused(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """Jinja as `apply_chat_template` of transformers 5 sets it up, with this time for `strftime_now`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, dict=_Dict(), namespace=_Namespace,
                               strftime_now=lambda format: now.strftime(format))
    return environment


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as transformers hands them to a template: without empty keys, and their reasoning under each of its names."""
    made = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        reasoning = next((kept[key] for key in _REASONING if key in kept), None)
        made.append(kept if reasoning is None else {"thinking": reasoning} | kept | {"reasoning_content": reasoning})
    return made


def _render(template: jinja2.Template, special_tokens: dict[str, str], job: dict[str, Any], longest: int) -> str:
    """Raises _TooLong beyond `longest` characters, _Unfit without a message, and whatever a template may raise."""
    if not job["messages"]:
        raise _Unfit("it has no messages")
    random.seed(0)  # `random` and `lipsum` of a template: the same in each run
    variables = special_tokens | {"messages": _messages(job["messages"]), "tools": None, "documents": None,
                                  "add_generation_prompt": job["add_generation_prompt"]}
    pieces, length = [], 0
    for piece in template.root_render_func(template.new_context(variables)):
        pieces.append(piece)
        length += len(piece)
        if length > longest:
            raise _TooLong(f"the template makes a text of over {longest} characters of it")
    return "".join(pieces)


def _reason(error: Exception) -> str:
    """What is wrong, in one line, with the line of the template."""
    if isinstance(error, MemoryError):
        return f"the template takes over {MEMORY >> 20} MB of memory"
    if isinstance(error, _Unfit):
        return str(error)
    message = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    message = " ".join(message[:LONGEST_REASON].split())
    if isinstance(error, Refused):
        return f"the template refuses it: {message}"
    line = error.lineno if isinstance(error, TemplateSyntaxError) else _line(error)
    return f"line {line} of the template: {message}" if line else f"the template: {message}"


def _line(error: Exception) -> int | None:
    """The innermost line of the template that the error passed through."""
    line = None
    for frame, python_line in traceback.walk_tb(error.__traceback__):
        if (compiled := frame.f_globals.get("__jinja_template__")) is not None:
            line = compiled.get_corresponding_lineno(python_line)
    return line


def _answer(replies: BinaryIO, kind: bytes, data: bytes) -> None:
    replies.write(kind + LENGTH.pack(len(data)))
    replies.write(data)
    replies.flush()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _frame(requests: BinaryIO) -> bytes:
    return requests.read(*LENGTH.unpack(requests.read(LENGTH.size)))


def _confine() -> None:
    """The limits of this process; where a system lacks one of them, the others hold."""
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        _limit(resource.RLIMIT_AS, int(file.read().split()[0]) * resource.getpagesize() + MEMORY)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE):
        _limit(kind, 0)


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (most, most))


def _allow(seconds: float) -> None:
    """End this process after so much processor time from now on, in the middle of any instruction; 0: no longer."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    time.tzset()  # opens a file
    _confine()
    setup = json.loads(_frame(requests).decode("utf-8", "surrogatepass"))
    template = None
    try:
        _allow(setup["seconds"])
        template = _environment(datetime.fromtimestamp(setup["now"])).from_string(setup["source"])
        kind, data = TEXT, b""
    except Exception as error:
        kind, data = FAULT, _encoded(_reason(error))
    _allow(0)
    _answer(replies, kind, data)
    while template is not None and (count := requests.read(LENGTH.size)):
        for frame in [_frame(requests) for _ in range(*LENGTH.unpack(count))]:
            try:
                _allow(setup["seconds"])
                job = json.loads(frame.decode("utf-8", "surrogatepass"))
                longest = max(setup["longest"], 100 * len(frame))
                kind, data = TEXT, _encoded(_render(template, setup["special_tokens"], job, longest))
            except Exception as error:
                kind = BEYOND if isinstance(error, _TooLong | MemoryError) else FAULT
                data = _encoded(_reason(error))
            _allow(0)
            _answer(replies, kind, data)


if __name__ == "__main__":
    main()
