"""Conversations of several turns: as turns, and as a transcript in one text.

A transcript has one paragraph a turn, which begins with the speaker's name: "Human:" and "Assistant:" in the form of Anthropic's
HH-RLHF (Bai et al. 2022, arXiv:2204.05862), "User:" and "Assistant:" as RWKV's chat models read it, and "System:" only at the
beginning. In a CSV's prompt column a prompt of several turns is written and read as a transcript.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

HUMAN, ASSISTANT, SYSTEM = "Human", "Assistant", "System"
# Names for the human; a transcript uses one of them, and there the other is text.
ASKERS = (HUMAN, "User")
# A system message can only come first; anywhere else "System:" is text.
_TURNS = {asker: re.compile(rf"(?:\A\s*|\n\n(?!{SYSTEM}))({asker}|{ASSISTANT}|{SYSTEM}):") for asker in ASKERS}
_LOOSE_TURNS = re.compile(rf"(?:\A\s*|\n(?!{SYSTEM}))(User|{ASSISTANT}|{SYSTEM}):")
_ASKER = re.compile(rf"(?:\A\s*|\n\n)({'|'.join(ASKERS)}):")
# Templates of RWKV that a prompt of one question may already be in, up to the answer.
_SINGLE = (("Question", "Answer"), ("Input", "Response"), ("Instruction", "Response"), ("Q", "A"))


class Turn(NamedTuple):
    """`speaker` is HUMAN, ASSISTANT or SYSTEM; `trained` is False if the data say that a turn has no loss."""

    speaker: str
    text: str
    trained: bool = True


def clean(text: str) -> str:
    """Strip the ends, make every line ending `\\n`, and replace blank lines by a single one.

    A line of only whitespace counts as blank; the indentation of the line after it stays.
    """
    return re.sub(r"\n\s*\n", "\n", re.sub(r"\r\n?", "\n", text.strip()))


def read_transcript(text: str) -> list[Turn] | None:
    """The turns of a transcript, or None for any other text.

    A text that begins with a speaker's name is a transcript. So is a text whose first name is "Assistant:"; what comes before it
    is the human's. Empty turns are left out, and consecutive turns of one speaker are joined.
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
    """Speakers and their texts unchanged, including empty ones; None for a text that is no transcript."""
    text = _one_blank_line(text)
    found = _ASKER.search(text)
    asker = found[1] if found else HUMAN
    # The text before the first name, a name, its text, and so on.
    lead, *pieces = _TURNS[asker].split(text)
    if pieces[::2] == [SYSTEM] or (pieces[::2] == ["User"] and f"\n\n{HUMAN}:" not in text):
        # A file may have lost the blank lines. Not with "Human:", which our own transcripts use, where single lines are text.
        loose_lead, *loose = _LOOSE_TURNS.split(text)
        if ASSISTANT in loose[::2]:
            lead, pieces, asker = loose_lead, loose, "User"
    if not pieces or (lead.strip() and pieces[0] != ASSISTANT):
        return None
    parts = [(HUMAN if name == asker else name, part) for name, part in zip(pieces[::2], pieces[1::2], strict=True)]
    return [(HUMAN, lead), *parts] if lead.strip() else parts


def prompt_turns(prompt: str) -> list[Turn]:
    """The turns of a prompt, ending with the human's: those of a transcript that leaves the answer open, else the text as one.

    A question that is already in one of RWKV's templates, such as `Question: ...\\n\\nAnswer:`, is taken out of it.
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
    # Searching for any number of blank lines before a speaker would rescan long runs again and again.
    return re.sub(r"\n\s*\n", "\n\n", re.sub(r"\r\n?", "\n", text))


def is_conversation(prompt: str) -> bool:
    """Whether a prompt has more than one question."""
    return len(prompt_turns(prompt)) > 1


def write_prompt(turns: Sequence[Turn]) -> str:
    """The text that `prompt_turns` reads as these turns, cleaned; a single question stays as it is where possible."""
    if len(turns) == 1 and prompt_turns(turns[0].text) == [Turn(HUMAN, turns[0].text)]:
        return turns[0].text
    return "\n\n".join(f"{turn.speaker}: {clean(turn.text)}" for turn in turns)


def joined(turns: Iterable[Turn]) -> list[Turn]:
    """Join consecutive turns of one speaker, each text on lines of its own; empty turns are left out."""
    result = []
    for _, run in groupby((turn for turn in turns if turn.text.strip()), key=lambda turn: turn.speaker):
        same = list(run)
        result.append(same[-1]._replace(text="\n".join(turn.text.strip() for turn in same)))
    return result
