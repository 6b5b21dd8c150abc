"""The text that the example's base model is trained on: Python's own documentation (PSF licence), as every Python carries it.

Three kinds of documents, each followed by the byte 0: the standard library's docstrings, the language reference in
`pydoc_data.topics`, and questions with short answers, all about names that the example's CSVs do not ask about.
`python example/DPO/corpus.py [--output FILE]` prints what it is made of. The text follows the Python that runs it.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

import pandas

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from example.DPO.answers import asked_names, nearly_same, question, short_answer, without_lead, words
from example.DPO.docstrings import Entry, stdlib_entries
from src.cli.parser import Parser
from src.cli.run import run
from src.data.templates import CLASSIC, answer_pieces, draw_form, prompt_pieces, text_of
from src.files import atomic_write, existing_file

CSV_FOLDER = Path(__file__).parent / "input_csv"
CSV_NAMES = ("rlhf_example_dataset.csv", "rlhf_example_heldout.csv")

QUESTIONS_PER_NAME = 3

_TO_ASCII = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
    | {"\u2013": "-", "\u2014": "--", "\u2026": "...", "\u2022": "*", "\u00a0": " "}
)


def build_corpus(exclude: set[str] | None = None) -> str:
    """The whole corpus as one string: the documents in a fixed mixed order, the character 0 after each.

    `exclude` holds the answers of the preference pairs, training and held out; by default those of the CSVs beside this
    file. What contains one of them, or documents a name that they are about or one of nearly the same description, is
    left out. The last fiftieth or so of the text is about names that the rest does not document, to validate on.
    """
    return joined(documents(exclude))


def joined(kinds: dict[str, dict[str, str]]) -> str:
    """The documents of every kind in the order that `build_corpus` tells."""
    names = {text: name for texts in kinds.values() for text, name in texts.items()}
    mixed = sorted(names, key=lambda text: (_draw(names[text]) % 50 == 0, _draw(text)))
    return "".join(text + "\0" for text in mixed)


def documents(exclude: set[str] | None = None) -> dict[str, dict[str, str]]:
    """The corpus by kind: "docstrings", "topics" and "questions", each text with the name it is about; see `build_corpus`."""
    exclude = answers_of_the_example() if exclude is None else exclude
    taboo = [squeezed(key_sentence(answer)) for answer in exclude]
    taboo_words = [words(without_lead(answer)) for answer in exclude]
    asked = asked_names()
    described = {entry: short_answer(entry) or "" for entry in stdlib_entries() if entry.name not in asked}
    described = {entry: answer for entry, answer in described.items() if not _nearly_one_of(words(answer), taboo_words)}
    # Many names share a text: the first has it.
    distinct = {entry.text: entry for entry in reversed(described)}
    public = {answer: entry for entry, answer in reversed(described.items()) if answer and entry.is_public}
    kinds = {
        "docstrings": ((clean(f"{entry.signature or entry.name}\n\n{text}"), entry.name) for text, entry in distinct.items()),
        "topics": ((clean(text), name) for name, text in topics.items()),
        "questions": _question_documents(public),
    }
    return {kind: {text: name for text, name in texts if not contains_any(text, taboo)} for kind, texts in kinds.items()}


def _question_documents(entries: dict[str, Entry]) -> Iterator[tuple[str, str]]:
    for answer, entry in entries.items():
        for turn in range(QUESTIONS_PER_NAME):
            prompt = question(entry, turn)
            # A text for a seed: the same question always gets the same template.
            pieces = prompt_pieces(CLASSIC, prompt, draw_form(CLASSIC, Random(prompt))) + answer_pieces(CLASSIC, prompt, answer)
            yield text_of(pieces), entry.name


def _nearly_one_of(answer: frozenset[str], others: list[frozenset[str]]) -> bool:
    return any(nearly_same(answer, other) for other in others)


def _draw(text: str) -> int:
    """A number that depends on nothing but the text, to order by."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def clean(text: str) -> str:
    """A document's text: typographic characters as ASCII, no tabs or control characters, at most one blank line in a row."""
    text = text.translate(_TO_ASCII).expandtabs(4)
    text = re.sub(r"[^\x20-\x7e\n\u00a1-\uffff]", "", text)
    text = re.sub(r"[ ]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def key_sentence(answer: str) -> str:
    """The part of an answer that gives it away: its first sentence, without the lead that names the tool."""
    bare = without_lead(answer)
    first = re.split(r"(?<=\.)\s", bare, maxsplit=1)[0]
    return (first if len(first) >= 30 else bare).removesuffix(".")


def squeezed(text: str) -> str:
    """Text for comparison: lower case, one space where there was any white space, no markup."""
    text = re.sub(r":(?:\w+:)?\w+:`", "`", text)
    return " ".join(re.sub(r"[`*]", "", text).lower().split())


def contains_any(text: str, phrases: list[str]) -> bool:
    """Whether one of the squeezed `phrases` occurs in `text`."""
    text = squeezed(text)
    return any(phrase in text for phrase in phrases)


def answers_of_the_example(folder: Path = CSV_FOLDER) -> set[str]:
    """Every chosen answer of the committed CSVs, training and held out."""
    return {answer for name in CSV_NAMES for answer in pandas.read_csv(existing_file(folder / name, "example"))["chosen"]}


def main(arguments: Sequence[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--output", help="write the corpus to this file")
    output = parser.parse_args(arguments).output
    kinds = documents()
    for kind, texts in kinds.items():
        print(f"{kind:12}{len(texts):8} documents{sum(len(text.encode()) + 1 for text in texts):12,} bytes")
    corpus = joined(kinds).encode()
    print(f"{'all':12}{corpus.count(0):8} documents{len(corpus):12,} bytes")
    if output:
        with atomic_write(output) as file:
            file.write(corpus)


if __name__ == "__main__":
    run(main)
