"""The embedded example's CSVs, and that the base model's training text gives none of their answers away."""

import csv
import re
import sys
from itertools import product
from pathlib import Path

import pytest

from example.DPO.answers import question, short_answer
from example.DPO.corpus import build_corpus
from example.DPO.docstrings import Entry
from example.DPO.make_dataset import build_pairs, split

FOLDER = Path(__file__).parents[2] / "example" / "DPO" / "input_csv"


def rows(name: str) -> list[dict[str, str]]:
    with open(FOLDER / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


TRAINING, HELD_OUT = rows("rlhf_example_dataset.csv"), rows("rlhf_example_heldout.csv")


def described(answer: str) -> str:
    """What an answer says about the thing that it names."""
    return re.sub(r"^(Use|Python raises) `[\w.]+`\. ", "", answer)


def test_sizes_and_columns():
    assert {tuple(row) for row in TRAINING + HELD_OUT} == {("prompt", "chosen")}
    total = len(TRAINING) + len(HELD_OUT)
    assert total >= 200
    assert abs(len(HELD_OUT) / total - 0.2) < 0.005


def test_prompts_are_questions_asked_once():
    prompts = [row["prompt"] for row in TRAINING + HELD_OUT]
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert re.fullmatch(r"[A-Z][\x20-\x7e]{8,98}\?", prompt), prompt


def test_answers_are_one_or_two_plain_sentences():
    answers = [row["chosen"] for row in TRAINING + HELD_OUT]
    assert len(set(map(described, answers))) == len(answers)
    for answer in answers:
        assert answer.isascii() and answer.isprintable(), answer
        assert 30 <= len(answer.encode()) <= 200, answer
        assert re.match(r"[A-Z]", answer) and answer.endswith("."), answer
        assert ">>>" not in answer and "->" not in answer and "::" not in answer, answer
        assert 1 <= len(re.findall(r"[.!?](?= [A-Z]|$)", answer)) <= 2, answer


def test_no_held_out_answer_is_nearly_in_the_training_part():
    for held_out, training in product(HELD_OUT, TRAINING):
        one, other = (set(re.findall(r"[a-z0-9]+", described(row["chosen"]).lower())) for row in (held_out, training))
        # Two answers that share six words in ten describe the same thing for this purpose.
        assert len(one & other) < 0.6 * len(one | other), (held_out["chosen"], training["chosen"])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (
            "S.find(sub[, start]) -> int\n\nReturn the lowest index\nin S where sub is found.",
            "Return the lowest index in the string where sub is found.",
        ),
        ("Return ``x`` as a :class:`Fraction` of integers\n\n>>> f(1)\n1", "Return `x` as a `Fraction` of integers."),
        ("Do the work. It takes one argument, e.g. a name. And\nmore.", "Do the work. It takes one argument, e.g. a name."),
        ("Copy the tree.\n\nLinks are followed by default.", "Copy the tree. Links are followed by default."),
        ("Open the file whose name is given:\n\n  open(name)", None),
        ("Too short.", None),
        ("Deprecated since long ago, use the other one instead.", None),
        ("Write the object to the caf\u00e9 and return the bill.", None),
        ("Return the value (of the last call, for instance.", None),
        ("word " * 60 + "end.", None),
    ],
)
def test_short_answer(text, answer):
    assert short_answer(Entry("str.thing", "method", "str.thing()", text)) == answer


def test_short_answer_after_an_opening():
    entry = Entry("os.walk", "function", "os.walk()", "Directory tree generator.\n\nFor each directory, yields\n\n   a tuple")
    assert short_answer(entry, "Use `os.walk`.") == "Use `os.walk`. Directory tree generator."


def test_question_forms_differ_from_turn_to_turn():
    entry = Entry("heapq.merge", "function", "heapq.merge()", "")
    asked = {question(entry, turn) for turn in range(3)}
    assert len(asked) == 3 and all("heapq.merge" in prompt for prompt in asked)


@pytest.mark.slow
def test_this_python_still_answers_nearly_all_names():
    pairs, missing = build_pairs()
    training, held_out = split(pairs)
    assert len(missing) <= 25, missing
    assert abs(len(held_out) / len(pairs) - 0.2) < 0.01
    if sys.version_info[:3] == (3, 11, 7) and sys.platform == "linux":
        assert [tuple(row.values()) for row in TRAINING] == training
        assert [tuple(row.values()) for row in HELD_OUT] == held_out


@pytest.mark.slow
def test_corpus_gives_no_answer_away():
    corpus = build_corpus()
    assert corpus.endswith("\0") and "\0\0" not in corpus
    size = len(corpus.encode())
    assert 3e6 < size < 6e6
    assert sum(not character.isascii() for character in corpus) < 1e-3 * size

    plain = " ".join(re.sub(r"[`*]", "", corpus).lower().split())
    for row in TRAINING + HELD_OUT:
        assert re.sub(r"[`*]", "", described(row["chosen"])).lower().removesuffix(".") not in plain, row["chosen"]

    asked = re.findall(r"(?:^|\0)(User|Question|Input): ([^\n]+)\n\n(?:Assistant|Answer|Response): [^\n]+\n\n(?=\0)", corpus)
    assert len(asked) > 8000
    assert not {prompt for _, prompt in asked} & {row["prompt"] for row in TRAINING + HELD_OUT}
    # The toolkit's own mix; with thousands of draws a share strays from it by less than a hundredth (three deviations).
    assert abs(sum(template == "User" for template, _ in asked) / len(asked) - 0.8) < 0.015
