"""Writes the example's prompts and good answers from the documentation that every Python carries (PSF licence).

`python example/DPO/make_dataset.py [--output_dir DIR]` asks about the names in names.txt, takes the docstring's own
first words for the answer, and holds out a fifth. The same Python gives the same files; the committed ones are of
Python 3.11.7 on Linux. There is no `reject` column: the base model writes those.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from example.DPO.answers import asked_names, lead, nearly_same, question, short_answer, without_lead, words
from example.DPO.corpus import CSV_FOLDER, CSV_NAMES
from example.DPO.docstrings import stdlib_entries
from src.cli.parser import Parser
from src.cli.run import run
from src.files import atomic_write

HELD_OUT = 0.2


class Pair(NamedTuple):
    """A row of the CSV."""

    prompt: str
    chosen: str


def build_pairs() -> tuple[list[Pair], list[str]]:
    """The pairs in a fixed mixed order, and the names that this Python has no good answer for, or the same as another's."""
    entries = {entry.name: entry for entry in stdlib_entries() if entry.is_public}
    pairs: dict[str, Pair] = {}
    missing = []
    for name, asked in asked_names().items():
        entry = entries.get(name)
        answer = entry and short_answer(entry, lead(entry) if asked else "")
        if not answer or without_lead(answer) in pairs:
            missing.append(name)
        else:
            pairs[without_lead(answer)] = Pair(asked or question(entry), answer)
    return sorted(pairs.values(), key=_order), missing


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; answers that nearly agree, straight or through others, stay on one side."""
    groups: list[list[Pair]] = []
    for pair in pairs:
        similar = [group for group in groups if any(nearly_same(_words(pair), _words(other)) for other in group)]
        groups = [group for group in groups if group not in similar]
        groups.append([other for group in similar for other in group] + [pair])
    held_out: list[Pair] = []
    for group in sorted(groups, key=lambda group: _order(group[0])):
        if len(held_out) + len(group) <= round(HELD_OUT * len(pairs)):
            held_out += group
    return [pair for pair in pairs if pair not in held_out], [pair for pair in pairs if pair in held_out]


def _words(pair: Pair) -> frozenset[str]:
    return words(without_lead(pair.chosen))


def _order(pair: Pair) -> bytes:
    return hashlib.sha256(pair.prompt.encode()).digest()


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=CSV_FOLDER, help="where the two CSV files go")
    folder = parser.parse_args(arguments).output_dir
    pairs, missing = build_pairs()
    for name, part in zip(CSV_NAMES, split(pairs), strict=True):
        with atomic_write(folder / name, "w", encoding="utf-8", newline="") as file:
            pandas.DataFrame(part).to_csv(file, index=False, lineterminator="\n")
        print(f"{folder / name}: {len(part)} pairs")
    if missing:
        print(f"left out, as this Python's documentation has no answer of their own for them: {', '.join(missing)}")


if __name__ == "__main__":
    run(main)
