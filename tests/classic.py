"""What the template `classic` makes of texts, for tests."""

from collections.abc import Sequence

from src.data.conversation import Turn
from src.data.templates import CLASSIC, Piece, answer_pieces, prompt_pieces, text_of

NAMES = CLASSIC.forms


def format_prompt(form: int, prompt: str) -> str:
    return text_of(prompt_pieces(CLASSIC, prompt, form))


def format_answer(answer: str) -> str:
    return text_of(answer_pieces(CLASSIC, "?", answer))


def format_conversation(turns: Sequence[Turn], first: int, form: int) -> list[Piece]:
    return CLASSIC.conversation(turns, first, form)
