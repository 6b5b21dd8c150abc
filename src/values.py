"""The values of flags: whole numbers, numbers, texts and paths, each within bounds that its message names.

Bounds are far beyond any use; they are the limits of number formats or memory.
"""

import errno
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from src.console import short
from src.files import WORDS
from src.numbers import RATE, STRENGTH, read_number

MOST = 10**9  # for values that are only counted or compared
LONGEST_NAME = 200  # bytes of an output's name; names of further files add endings to it, and 255 is Linux's limit
_WHOLE = re.compile(r"[+-]?[0-9]{1,30}")
# Characters that wandb does not allow in a project's name, and the longest name.
_NOT_IN_A_PROJECT, _LONGEST_PROJECT = "/\\#?%:", 128


@dataclass(frozen=True)
class Reader:
    """Turns a flag's text into its value, or raises ArgumentTypeError; `takes` describes the accepted texts."""

    read: Callable[[str], Any]
    takes: str

    def __call__(self, text: str) -> Any:
        return self.read(text)


def _zero_or_one(text: str) -> bool:
    """A switch as in RWKV's tools: `--flag 1`, `--flag 0`."""
    if text not in ("0", "1"):
        raise ArgumentTypeError(f"takes 0 or 1, not {shown(text)}")
    return text == "1"


def whole(least: int, most: int = MOST) -> Reader:
    """A whole number in ASCII digits."""
    takes = f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        value = int(text) if _WHOLE.fullmatch(text) else least - 1
        if not least <= value <= most:
            raise ArgumentTypeError(f"takes {takes}, not {shown(text)}")
        return value

    return Reader(read, takes)


zero_or_one = Reader(_zero_or_one, "0 or 1")
positive, not_negative = whole(1), whole(0)
seed = whole(0, 2**32 - 1)  # accepted by every random generator in use


def number(least: float, most: float, or_zero: bool = False) -> Reader:
    """A number in ASCII digits; `or_zero`: also 0, but nothing between 0 and `least`, which would vanish in float32."""
    takes = f"{'0 or ' * or_zero}a number from {least:g} to {most:g}"

    def read(text: str) -> float:
        value = read_number(text)
        if value is None or not (least <= value <= most or (or_zero and value == 0)):
            raise ArgumentTypeError(f"takes {takes}, not {shown(text)}")
        return value

    return Reader(read, takes)


# Learning rates; weights of losses; strengths, which must not be 0.
rate, weight, strength = number(*RATE, or_zero=True), number(*STRENGTH, or_zero=True), number(*STRENGTH)


def _words(text: str) -> str:
    """A text that is not a path."""
    if not is_utf8(text):
        raise ArgumentTypeError(f"takes text in UTF-8, which {shown(text)} is not")
    return text


def _path(text: str) -> str:
    """A path of any bytes; the file itself is checked later."""
    if not text.strip():
        raise ArgumentTypeError("is empty; name a file or folder, or leave the flag out")
    beginning = text.split("/")[0]
    if text.startswith("~") and not os.path.lexists(beginning):
        raise ArgumentTypeError(f"{shown(text)} was not expanded by the shell, which replaces ~ only at the beginning of words "
                                f"without quotes; write the folder out, or ./{beginning} if that is its name")
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ArgumentTypeError(f"{shown(text)} is longer than the system allows") from None
    return text


def _output(text: str) -> str:
    """The path of a file to write."""
    _path(text)
    if text.endswith("/"):
        raise ArgumentTypeError(f"{shown(text)} ends like a folder; name a file")
    if len(os.fsencode(os.path.basename(text))) > LONGEST_NAME:
        raise ArgumentTypeError(f"{shown(text)} has a name of over {LONGEST_NAME} bytes; choose a shorter one")
    return text


def _tokenizer(text: str) -> str:
    """`world`, `bytes`, or an existing tokenizer.json; the tokenizers library takes only paths in UTF-8."""
    if _words(text) not in WORDS["tokenizer"]:
        if not _path(text).endswith(".json"):
            raise ArgumentTypeError(f"takes {', '.join(WORDS['tokenizer'])}, or the path of a tokenizer.json, not {shown(text)}")
        if not Path(text).exists():
            raise ArgumentTypeError(f"{text} does not exist")
    return text


def _template(text: str) -> str:
    """The name of a template, with spaces or dashes in it, or an existing file."""
    name = text.strip().lower().replace(": ", ":").replace(" ", "-")
    if name in WORDS["template"]:
        return name
    if not Path(_path(text)).exists():
        raise ArgumentTypeError(f"takes {', '.join(WORDS['template'])}, or the path of a Jinja chat template or a "
                                f"tokenizer_config.json, not {shown(text)}")
    return text


def _wandb_project(text: str) -> str:
    """wandb's `project` or `entity/project`, given directly or as the address of its page; "" for none."""
    given = _words(text).strip()
    if "://" in given or given.startswith("wandb.ai/"):
        place = urlsplit(given if "://" in given else f"https://{given}").path
        given = "/".join(map(unquote, place.strip("/").split("/")[:2]))
        if "/" not in given:
            raise ArgumentTypeError(f"takes the address of a project, https://wandb.ai/ENTITY/PROJECT, not {shown(text)}")
    entity, slash, project = given.partition("/")
    for name in (entity, project) if slash else (entity,):
        if text and (not name.strip() or not name.isprintable() or set(name) & set(_NOT_IN_A_PROJECT)):
            raise ArgumentTypeError(f"takes project or entity/project without {' '.join(_NOT_IN_A_PROJECT)} in their names, not "
                                    f"{shown(text)}")
        if len(name) > _LONGEST_PROJECT:
            raise ArgumentTypeError(f"takes names of at most {_LONGEST_PROJECT} characters, not one of {len(name)}")
    return entity + slash + project


words, path, output = Reader(_words, "text"), Reader(_path, "a path"), Reader(_output, "a file to write")
input_file = Reader(_path, "a file to read")
layer_profile = Reader(_path, "auto, or a file to read")
tokenizer = Reader(_tokenizer, "world, bytes, or a tokenizer.json")
# What --tokenizer does, for help.
TOKENIZER = f"{tokenizer.takes}; if not given, determined by the checkpoint's vocabulary (65536 world, 256 bytes)"
template = Reader(_template, "the name of a template, or a file")
# What --template does, for help.
TEMPLATE = (f"how turns are written and what ends an answer: {', '.join(WORDS['template'])}, or a file with a Jinja chat "
            "template (.jinja, tokenizer_config.json); see docs/templates.md")
wandb_project = Reader(_wandb_project, "a project, entity/project, or its address")


def is_utf8(text: str) -> bool:
    """False if an argument or a path has bytes that are not UTF-8, which are lone surrogates in Python."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def shown(text: str) -> str:
    """A value in quotes, cut if it is long."""
    return repr(short(text, 80))
