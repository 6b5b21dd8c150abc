"""The turn templates that texts are put in before they become tokens.

A blank line ends a turn, for the base models and for the sampler, which stops there. So a text must not contain
one: `clean` removes them, and both format functions clean their texts.

A prompt of one question is put in one of three templates. A conversation of several turns, or one with a system message, always
has the first: `System: ...`, `User: ...`, `Assistant: ...`, as RWKV's chat models are prompted.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import numpy as np

from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn, clean, prompt_turns

NAMES = ("user", "question", "input")
_PREFIXES = (("User", "Assistant"), ("Question", "Answer"), ("Input", "Response"))


class Piece(NamedTuple):
    """A stretch of a conversation's text."""

    text: str
    is_answer: bool
    may_train: bool = True  # False for an answer that has no loss according to the data


def format_prompt(template_index: int, prompt: str) -> str:
    """The prompt's side of a turn, `User: ...\\n\\nAssistant:` for template 0; `NAMES` names the indices.

    A transcript (`src/data/conversation.py`) becomes `User: ...\\n\\nAssistant: ...\\n\\nUser: ...\\n\\nAssistant:`.
    """
    turns = [*prompt_turns(prompt), Turn(ASSISTANT, "")]
    return format_conversation(turns, len(turns) - 1, template_index)[0].text


def format_conversation(turns: Sequence[Turn], first: int, template_index: int) -> list[Piece]:
    """Whole turns as consecutive pieces: the text before an answer, the answer, and so on.

    Answers are the assistant's turns from number `first` on; earlier ones count as part of the prompt. The template drawn applies
    only to a single question with its answer, as in `format_prompt`.
    """
    asker, answerer = _PREFIXES[template_index if [turn.speaker for turn in turns] == [HUMAN, ASSISTANT] else 0]
    names = {HUMAN: asker, ASSISTANT: answerer, SYSTEM: "System"}
    pieces, before = [], ""
    for number, turn in enumerate(turns):
        before += f"{names[turn.speaker]}:"
        if turn.speaker == ASSISTANT and number >= first:
            pieces += [Piece(before, False), Piece(format_answer(turn.text), turn.trained, turn.trained)]
            before = ""
        else:
            before += format_answer(turn.text)
    return pieces


def format_answer(answer: str) -> str:
    """The answer's side of a turn, the same in all templates: a space before it, a blank line to end it."""
    return f" {clean(answer)}\n\n"


def draw_template(generator: np.random.Generator | Random) -> int:
    """Draw a template's index: 0 with 80 %, 1 with 10 %, 2 with 10 %; uses one uniform number of the generator."""
    number = generator.random()
    return 0 if number < 0.8 else 1 if number < 0.9 else 2
