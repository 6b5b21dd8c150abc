"""Conversations of several turns: as turns, and as a transcript in one text.

In a transcript each turn begins with the speaker's name, after a blank line: "Human:" and "Assistant:" in the form of Anthropic's
HH-RLHF (Bai et al. 2022, arXiv:2204.05862), "User:" and "Assistant:" as RWKV's chat models read it, and "System:" only at the
beginning. In a CSV's prompt column a prompt of several turns is written and read as a transcript, or as JSON messages where a
turn could be mistaken for several.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

HUMAN, ASSISTANT, SYSTEM = "Human", "Assistant", "System"
# Names for the human; a transcript uses one of them, and there the other is text.
ASKERS = (HUMAN, "User")
# The roles of chat messages.
ROLES = {HUMAN: "user", ASSISTANT: "assistant", SYSTEM: "system"}
_NAMES = (*ASKERS, ASSISTANT, SYSTEM)
_FIRST = re.compile(rf"\s*+({'|'.join(_NAMES)}):")
_NAME = re.compile(rf"^({'|'.join(_NAMES)}):", re.MULTILINE)
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


def untouched(text: str) -> str:
    """The text itself, without its outer white space and with `\\n` for `\\r\\n`."""
    return text.replace("\r\n", "\n").strip()


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


class _Mark(NamedTuple):
    """A speaker's name within a text, and whether a blank line or the text's beginning is before it."""

    speaker: str
    start: int
    end: int
    apart: bool


def _marks(text: str) -> list[_Mark]:
    first = _FIRST.match(text)
    found = [_Mark(first[1], 0, first.end(), True)] if first else []
    for name in _NAME.finditer(text, first.end() if first else 0):
        start, end = name.span()
        found.append(_Mark(name[1], start, end, text[start - 2] == "\n" or _follows_blank_line(text, start)))
    return found


def _follows_blank_line(text: str, at: int) -> bool:
    """Whether the line before the one that begins at `at` is blank."""
    before = at - 1
    while before > 0 and text[before - 1].isspace():
        before -= 1
        if text[before] == "\n":
            return True
    return False


def _parts(text: str) -> list[tuple[str, str]] | None:
    """Speakers and their texts unchanged, including empty ones; None for a text that is no transcript."""
    text = text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")
    # A system message can only come first; anywhere else "System:" is text.
    named = [mark for mark in _marks(text) if mark.speaker != SYSTEM or mark.start == 0]
    apart = [mark for mark in named if mark.apart]
    asker = next((mark.speaker for mark in apart if mark.speaker in ASKERS), HUMAN)
    marks = [mark for mark in apart if mark.speaker in (asker, ASSISTANT, SYSTEM)]
    speakers = [mark.speaker for mark in marks]
    if speakers == [SYSTEM] or (speakers == ["User"] and not any(mark.speaker == HUMAN for mark in apart)):
        # A file may have lost the blank lines. Not with "Human:", which our own transcripts use, where single lines are text.
        loose = [mark for mark in named if mark.speaker != HUMAN]
        if any(mark.speaker == ASSISTANT for mark in loose):
            marks, asker = loose, "User"
    lead = text[:marks[0].start] if marks else ""
    if not marks or (lead.strip() and marks[0].speaker != ASSISTANT):
        return None
    ends = [*(mark.start for mark in marks[1:]), len(text)]
    parts = [(HUMAN if mark.speaker == asker else mark.speaker, text[mark.end:end])
             for mark, end in zip(marks, ends, strict=True)]
    return [(HUMAN, lead), *parts] if lead.strip() else parts


def prompt_turns(prompt: str) -> list[Turn]:
    """The turns of a prompt, ending with the human's: those of a transcript that leaves the answer open, or of JSON messages as
    `write_prompt` writes them, else the text as one.

    A question that is already in one of RWKV's templates, such as `Question: ...\\n\\nAnswer:`, is taken out of it.
    """
    return list(_prompt_turns(prompt))


@lru_cache(maxsize=8)  # a row's prompt is read several times, one after another
def _prompt_turns(prompt: str) -> tuple[Turn, ...]:
    turns = _written_as_json(prompt) or read_transcript(prompt)
    return tuple(turns) if turns and turns[-1].speaker == HUMAN else (Turn(HUMAN, _bare_question(prompt)),)


def _bare_question(prompt: str) -> str:
    text = _one_blank_line(prompt).strip()
    for asker, answerer in _SINGLE:
        opening, end = f"{asker}:", f"\n\n{answerer}:"
        question = text[len(opening):-len(end)]
        if (text.startswith(opening) and text.endswith(end) and question.strip()
                and end not in question and f"\n\n{opening}" not in question):
            return re.sub("\n\nInput:[ \n]?", "\n", question) if asker == "Instruction" else question
    return prompt


def _one_blank_line(text: str) -> str:
    # Searching for any number of blank lines before a speaker would rescan long runs again and again.
    return re.sub(r"\n\s*\n", "\n\n", re.sub(r"\r\n?", "\n", text))


def answer_places(turns: Sequence[Turn], first: int) -> list[int]:
    """The numbers of the assistant's turns, from turn `first` on."""
    return [at for at in range(first, len(turns)) if turns[at].speaker == ASSISTANT]


def is_conversation(prompt: str) -> bool:
    """Whether a prompt has more than one question."""
    return len(prompt_turns(prompt)) > 1


def write_prompt(turns: Sequence[Turn]) -> str:
    """The text that `prompt_turns` reads as these turns; a single question stays as it is where possible."""
    texts = [(turn.speaker, untouched(turn.text)) for turn in turns]
    bare = [turns[0].text] if len(turns) == 1 else []
    for text in (*bare, "\n\n".join(f"{speaker}: {text}" for speaker, text in texts)):
        if [(turn.speaker, untouched(turn.text)) for turn in prompt_turns(text)] == texts:
            return text
    return _JSON.encode([{"role": ROLES[speaker], "content": text} for speaker, text in texts])


_JSON = json.JSONEncoder(ensure_ascii=False)
_JSON_BEGINS = '[{"role": "'


def _written_as_json(prompt: str) -> list[Turn] | None:
    if not prompt.startswith(_JSON_BEGINS):
        return None
    speakers = {role: speaker for speaker, role in ROLES.items()}
    try:
        return [Turn(speakers[message["role"]], message["content"]) for message in json.loads(prompt)]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def joined(turns: Iterable[Turn]) -> list[Turn]:
    """Join consecutive turns of one speaker, each text on lines of its own; empty turns are left out."""
    result = []
    for _, run in groupby((turn for turn in turns if turn.text.strip()), key=lambda turn: turn.speaker):
        same = list(run)
        result.append(same[-1]._replace(text="\n".join(turn.text.strip() for turn in same)))
    return result
