"""The turn templates that texts are put in before they become tokens.

A blank line ends a turn, for the base models as for the sampler that stops there, so a text must not hold
one itself: `clean` sees to it, and both format functions clean what they are given.

A prompt of one question is put in one of three templates. A conversation of several turns, or one with a system message, has the
first of them whatever was drawn: `System: ...`, `User: ...`, `Assistant: ...`, as RWKV's chat models are prompted.
"""

from random import Random

import numpy as np

from src.preference.conversation import ASSISTANT, HUMAN, SYSTEM, clean, prompt_turns

NAMES = ("user", "question", "input")
_PREFIXES = (("User", "Assistant"), ("Question", "Answer"), ("Input", "Response"))
_CHAT = {HUMAN: "User", ASSISTANT: "Assistant", SYSTEM: "System"}


def format_prompt(template_index: int, prompt: str) -> str:
    """The prompt's side of a turn, `User: ...\\n\\nAssistant:` for template 0; `NAMES` names the indices.

    A transcript (`src/preference/conversation.py`) becomes `User: ...\\n\\nAssistant: ...\\n\\nUser: ...\\n\\nAssistant:`.
    """
    *before, (_, question) = turns = prompt_turns(prompt)
    if before:
        return "".join(f"{_CHAT[speaker]}: {clean(text)}\n\n" for speaker, text in turns) + "Assistant:"
    asker, answerer = _PREFIXES[template_index]
    return f"{asker}: {clean(question)}\n\n{answerer}:"


def format_answer(answer: str) -> str:
    """The answer's side of a turn, the same in all templates: a space before it, a blank line to end it."""
    return f" {clean(answer)}\n\n"


def draw_template(generator: np.random.Generator | Random) -> int:
    """Draw a template's index: 0 with 80 %, 1 with 10 %, 2 with 10 %; uses one uniform number of the generator."""
    number = generator.random()
    return 0 if number < 0.8 else 1 if number < 0.9 else 2
