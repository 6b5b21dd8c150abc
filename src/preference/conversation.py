"""Conversations of several turns: as turns, as a transcript in one text, and as the field's lists of messages.

A transcript is the form of Anthropic's HH-RLHF (Bai et al. 2022, arXiv:2204.05862): each turn is a paragraph that begins with
"Human:" or "Assistant:", a system message one that begins with "System:". It is what a prompt of several turns looks like in a
CSV's prompt column, where it is read back.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from src.errors import UserError

HUMAN, ASSISTANT, SYSTEM = "Human", "Assistant", "System"
# A system message can only come first; anywhere else "System:" is text.
_TURN = re.compile(rf"(?:\A\s*({HUMAN}|{ASSISTANT}|{SYSTEM})|\n\n({HUMAN}|{ASSISTANT})):")
_SPEAKERS = {"user": HUMAN, "human": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM, "developer": SYSTEM}


class Turn(NamedTuple):
    """`speaker` is HUMAN, ASSISTANT or SYSTEM."""

    speaker: str
    text: str


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
    # Blank lines come first, since a search for any number of them before a speaker would go through long runs again and again.
    text = re.sub(r"\n\s*\n", "\n\n", re.sub(r"\r\n?", "\n", text))
    marks = list(_TURN.finditer(text))
    speakers = [mark[1] or mark[2] for mark in marks]
    lead = text[:marks[0].start()] if marks else text
    if not marks or (lead.strip() and speakers[0] != ASSISTANT):
        return None
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    bodies = (text[mark.end():end] for mark, end in zip(marks, ends, strict=True))
    return _joined([Turn(HUMAN, lead), *map(Turn, speakers, bodies)])


def prompt_turns(prompt: str) -> list[Turn]:
    """The turns of a prompt, the human's last: those of a transcript that leaves the answer open, else the whole text as one."""
    turns = read_transcript(prompt)
    return turns if turns and turns[-1].speaker == HUMAN else [Turn(HUMAN, prompt)]


def is_conversation(prompt: str) -> bool:
    """Whether there is more to a prompt than one question."""
    return len(prompt_turns(prompt)) > 1


def write_prompt(turns: Sequence[Turn]) -> str:
    """The text that `prompt_turns` reads as these turns, cleaned; a question alone stands as it is where it can."""
    if len(turns) == 1 and prompt_turns(turns[0].text) == [Turn(HUMAN, turns[0].text)]:
        return turns[0].text
    return "\n\n".join(f"{speaker}: {clean(text)}" for speaker, text in turns)


def message_turns(messages: Sequence[Any], where: str) -> list[Turn]:
    """Turns from messages: `{"role": ..., "content": ...}` as in TRL and OpenAI's API, or ShareGPT's `{"from", "value"}`.

    Raises:
        UserError: beginning with `where`; no messages, something else than one, a role that no template has (tool), a system
            message behind others, or no text.
    """
    turns = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number},"
        if not isinstance(message, dict):
            raise UserError(f"{place} is a {type(message).__name__} where an object with role and content is expected")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        speaker = _SPEAKERS.get(role) if isinstance(role, str) else None
        if speaker is None:
            raise UserError(f"{place} has the role {role!r}; served are user, assistant and system")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{place} has no text as its content; write it out or remove the row")
        if speaker == SYSTEM and any(turn.speaker != SYSTEM for turn in turns):
            raise UserError(f"{place} is a system message behind others; it must come first")
        turns.append(Turn(speaker, content))
    if not turns:
        raise UserError(f"{where} is an empty list of messages; fill it in or remove the row")
    return _joined(turns)


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    result: list[Turn] = []
    for speaker, text in turns:
        if not text.strip():
            continue
        if result and result[-1].speaker == speaker:
            text = f"{result.pop().text}\n{text.strip()}"
        result.append(Turn(speaker, text.strip()))
    return result
