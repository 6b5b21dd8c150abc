"""The three turn templates that texts are put in before they become tokens.

A blank line ends a turn, for the base models as for the sampler that stops there, so a text must not hold
one itself: `clean` sees to it, and both format functions clean what they are given.
"""

import re
from random import Random

import numpy as np

NAMES = ("user", "question", "input")
_PREFIXES = (("User", "Assistant"), ("Question", "Answer"), ("Input", "Response"))


def clean(text: str) -> str:
    """Strip the ends, make every line ending `\\n`, and leave a single one where blank lines stood.

    A line of nothing but whitespace counts as blank; the indentation of the line after it stays.
    """
    return re.sub(r"\n\s*\n", "\n", re.sub(r"\r\n?", "\n", text.strip()))


def format_prompt(template_index: int, prompt: str) -> str:
    """The prompt's side of a turn, `User: ...\\n\\nAssistant:` for template 0; `NAMES` names the indices."""
    asker, answerer = _PREFIXES[template_index]
    return f"{asker}: {clean(prompt)}\n\n{answerer}:"


def format_answer(answer: str) -> str:
    """The answer's side of a turn, the same in all templates: a space before it, a blank line to end it."""
    return f" {clean(answer)}\n\n"


def draw_template(generator: np.random.Generator | Random) -> int:
    """Draw a template's index: 0 with 80 %, 1 with 10 %, 2 with 10 %; uses one uniform number of the generator."""
    number = generator.random()
    return 0 if number < 0.8 else 1 if number < 0.9 else 2
