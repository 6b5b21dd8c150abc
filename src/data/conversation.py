"""Conversations of several turns: as turns, and as a transcript in one text.

A transcript has one paragraph a turn, which begins with the speaker's name: "Human:" and "Assistant:" in the form of Anthropic's
HH-RLHF (Bai et al. 2022, arXiv:2204.05862), "User:" and "Assistant:" as RWKV's chat models read it, and "System:" at the
beginning only. It is what a prompt of several turns looks like in a CSV's prompt column, where it is read back.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

HUMAN, ASSISTANT, SYSTEM = "Human", "Assistant", "System"
# What the human is called; a transcript uses one name, and the other one is text in it.
ASKERS = (HUMAN, "User")
# A system message can only come first; anywhere else "System:" is text.
_TURNS = {asker: re.compile(rf"(?:\A\s*|\n\n(?!{SYSTEM}))({asker}|{ASSISTANT}|{SYSTEM}):") for asker in ASKERS}
_LOOSE_TURNS = re.compile(rf"(?:\A\s*|\n(?!{SYSTEM}))(User|{ASSISTANT}|{SYSTEM}):")
_ASKER = re.compile(rf"(?:\A\s*|\n\n)({'|'.join(ASKERS)}):")
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
    parts = _parts(text)
    return None if parts is None else joined(Turn(speaker, part) for speaker, part in parts)


def ends_in_empty_answer(text: str) -> bool:
    """Whether a transcript's last turn is the assistant's and has no text."""
    parts = _parts(text)
    if not parts:
        return False
    speaker, text = parts[-1]
    return speaker == ASSISTANT and not text.strip()


def _parts(text: str) -> list[tuple[str, str]] | None:
    """Speakers and what they say as it stands, empty texts too; None for what is no transcript."""
    text = _one_blank_line(text)
    found = _ASKER.search(text)
    asker = found[1] if found else HUMAN
    # The text before the first name, a name, its text, and so on.
    lead, *pieces = _TURNS[asker].split(text)
    if pieces[::2] == [SYSTEM] or (pieces[::2] == ["User"] and f"\n\n{HUMAN}:" not in text):
        # A file may have lost the blank lines. "Human:" stands in transcripts of our own, where single lines are text.
        loose_lead, *loose = _LOOSE_TURNS.split(text)
        if ASSISTANT in loose[::2]:
            lead, pieces, asker = loose_lead, loose, "User"
    if not pieces or (lead.strip() and pieces[0] != ASSISTANT):
        return None
    parts = [(HUMAN if name == asker else name, part) for name, part in zip(pieces[::2], pieces[1::2], strict=True)]
    return [(HUMAN, lead), *parts] if lead.strip() else parts


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


def joined(turns: Iterable[Turn]) -> list[Turn]:
    """Turns of one speaker in a row as one, their texts on lines of their own; empty ones are left out."""
    result = []
    for _, run in groupby((turn for turn in turns if turn.text.strip()), key=lambda turn: turn.speaker):
        same = list(run)
        result.append(same[-1]._replace(text="\n".join(turn.text.strip() for turn in same)))
    return result
