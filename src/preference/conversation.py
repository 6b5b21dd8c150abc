"""Conversations of several turns: as turns, and as a transcript in one text.

A transcript has one paragraph a turn, which begins with the speaker's name: "Human:" and "Assistant:" in the form of Anthropic's
HH-RLHF (Bai et al. 2022, arXiv:2204.05862), "User:" and "Assistant:" as RWKV's chat models read it, and "System:" at the
beginning only. It is what a prompt of several turns looks like in a CSV's prompt column, where it is read back.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

HUMAN, ASSISTANT, SYSTEM = "Human", "Assistant", "System"
# What the human is called; a transcript uses one name, and the other one is text in it.
ASKERS = (HUMAN, "User")
# A system message can only come first; anywhere else "System:" is text.
_TURN = re.compile(r"(?:\A\s*(Human|User|Assistant|System)|\n\n(Human|User|Assistant)):")
_LOOSE_TURN = re.compile(r"(?:\A\s*(User|Assistant|System)|\n(User|Assistant)):")
# Prompts of one question that are already in a template of RWKV's, the answer left open.
_SINGLE = (("Question", "Answer"), ("Input", "Response"), ("Instruction", "Response"), ("Q", "A"))


class Turn(NamedTuple):
    """`speaker` is HUMAN, ASSISTANT or SYSTEM; `trained` is False where the data say that a turn has no loss."""

    speaker: str
    text: str
    trained: bool = True


def clean(text: str) -> str:
    """Strip the ends, make every line ending `\\n`, and leave a single one where blank lines stood.

    A line of nothing but whitespace counts as blank; the indentation of the line after it stays.
    """
    return re.sub(r"\n\s*\n", "\n", re.sub(r"\r\n?", "\n", text.strip()))


def read_transcript(text: str) -> list[Turn] | None:
    """The turns of a transcript, or None for any other text.

    A text that begins with a speaker is one. So is one that begins without, where "Assistant:" is the first speaker to come: what
    stands before is the human's. Empty turns are left out, and turns of one speaker in a row are one.
    """
    turns = _all_turns(text)
    return turns and joined(turns)


def ends_in_empty_answer(text: str) -> bool:
    """Whether a transcript's last turn is the assistant's and has no text."""
    turns = _all_turns(text)
    return bool(turns) and turns[-1].speaker == ASSISTANT and not turns[-1].text.strip()


def _all_turns(text: str) -> list[Turn] | None:
    """The turns as they stand, empty ones too."""
    text = _one_blank_line(text)
    marks = _marks(_TURN, text)
    if [name for _, name in marks] in (["User"], [SYSTEM]):
        # A file may have lost the blank lines. "Human:" stands in transcripts of our own, where single lines are text.
        loose = _marks(_LOOSE_TURN, text)
        marks = loose if any(name == ASSISTANT for _, name in loose) else marks
    asker = next((name for _, name in marks if name in ASKERS), HUMAN)
    marks = [(mark, name) for mark, name in marks if name not in ASKERS or name == asker]
    lead = text[:marks[0][0].start()] if marks else text
    if not marks or (lead.strip() and marks[0][1] != ASSISTANT):
        return None
    ends = [*(mark.start() for mark, _ in marks[1:]), len(text)]
    turns = [Turn(HUMAN if name == asker else name, text[mark.end():end]) for (mark, name), end in zip(marks, ends, strict=True)]
    return [Turn(HUMAN, lead), *turns] if lead.strip() else turns


def _marks(pattern: re.Pattern, text: str) -> list[tuple[re.Match, str]]:
    """Where speakers are named, and their names."""
    return [(mark, mark[1] or mark[2]) for mark in pattern.finditer(text)]


def prompt_turns(prompt: str) -> list[Turn]:
    """The turns of a prompt, the human's last: those of a transcript that leaves the answer open, else the whole text as one.

    A question that stands in one of RWKV's templates already, such as `Question: ...\\n\\nAnswer:`, is that question.
    """
    turns = read_transcript(prompt)
    return turns if turns and turns[-1].speaker == HUMAN else [Turn(HUMAN, _bare_question(prompt))]


def _bare_question(prompt: str) -> str:
    text = _one_blank_line(prompt).strip()
    for asker, answerer in _SINGLE:
        opening, end = f"{asker}:", f"\n\n{answerer}:"
        question = text[len(opening):-len(end)]
        if (text.startswith(opening) and text.endswith(end) and question.strip()
                and end not in question and f"\n\n{opening}" not in question):
            return question.replace("\n\nInput:", "\n") if asker == "Instruction" else question
    return prompt


def _one_blank_line(text: str) -> str:
    # A search for any number of blank lines before a speaker would go through long runs again and again.
    return re.sub(r"\n\s*\n", "\n\n", re.sub(r"\r\n?", "\n", text))


def is_conversation(prompt: str) -> bool:
    """Whether there is more to a prompt than one question."""
    return len(prompt_turns(prompt)) > 1


def write_prompt(turns: Sequence[Turn]) -> str:
    """The text that `prompt_turns` reads as these turns, cleaned; a question alone stands as it is where it can."""
    if len(turns) == 1 and prompt_turns(turns[0].text) == [Turn(HUMAN, turns[0].text)]:
        return turns[0].text
    return "\n\n".join(f"{turn.speaker}: {clean(turn.text)}" for turn in turns)


def joined(turns: Sequence[Turn]) -> list[Turn]:
    """Turns of one speaker in a row as one, their texts on lines of their own; empty ones are left out."""
    filled = (turn for turn in turns if turn.text.strip())
    runs = (list(run) for _, run in groupby(filled, key=lambda turn: turn.speaker))
    return [run[-1]._replace(text="\n".join(turn.text.strip() for turn in run)) for run in runs]
