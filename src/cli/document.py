"""Writes docs/flags.md from the scripts' parsers: `make docs`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from src.cli import evaluate, generate, merge, prepare, train
from src.cli.parser import Parser
from src.settings import NEEDED, Flag

SCRIPTS = {"rlhf_generate_reject_csv.py": generate, "rlhf_dpo_generate_save.py": prepare, "train.py": train, "merge.py": merge,
           "evaluate.py": evaluate}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "flags.md"
HEAD = """# Flags

Generated from the settings in src/ by `make docs`, like `--help`. A flag whose default is **needed** is required; one without a
default is off, or its value is determined automatically. Flags marked *free* may be changed when a run is resumed (`--resume 1`).
"""


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([HEAD, *(line for name, script in SCRIPTS.items() for line in _section(name, script.parser()))])


def _section(name: str, parser: Parser) -> Iterator[str]:
    yield f"## {name}\n\n{parser.description}\n"
    titles: list[str | None] = list(dict.fromkeys(named.title for named in parser.named))
    for title in titles:
        if len(titles) > 1:
            yield f"### {title or 'general'}\n"
        yield "| flag | takes | default | |\n|---|---|---|---|"
        for flag_name, flag, _ in (named for named in parser.named if named.title == title):
            yield f"| `--{flag_name}` | {_cell(flag.takes)} | {_default(flag)} | {_cell(flag.help)}{' *free*' * flag.free} |"
        yield ""


def _default(flag: Flag) -> str:
    if flag.default is NEEDED:
        return "**needed**"
    return "" if flag.shown_default in (None, "") else f"`{flag.shown_default}`"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
