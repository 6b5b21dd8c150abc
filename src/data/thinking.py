"""The thinking part of an answer, `<think>...</think>` at its beginning, which a loss may leave out."""

from collections.abc import Sequence

from src.data.faults import BadRow
from src.data.templates import Ending
from src.tokenizer import Tokenizer

BEGIN, END = "<think>", "</think>"
# What --loss_on takes: the whole answer, or only what follows its thinking part.
LOSS_ON = ("all", "answer")
HELP_LOSS_ON = "answer: an answer's thinking part, <think>...</think>, carries no loss; all: the whole answer does"


def has_thinking(answer: str) -> bool:
    return answer.lstrip().startswith(BEGIN)


def check_thinking(answer: str, what: str) -> None:
    """Raises BadRow, beginning with `what`, if nothing would have a loss once the thinking part is left out."""
    if has_thinking(answer):
        _, end, rest = answer.partition(END)
        if not end:
            raise BadRow("unfinished thinking", f"{what} begins with {BEGIN} and has no {END}, so with --loss_on answer nothing "
                                                "of it has a loss; finish it, or take --loss_on all")
        if not rest.strip():
            raise BadRow("only thinking", f"{what} has nothing after {END}, so with --loss_on answer nothing of it has a loss; "
                                          "add the answer, or take --loss_on all")


def thinking_tokens(tokens: Sequence[int], ending: Ending, tokenizer: Tokenizer) -> int:
    """How many of an answer's first tokens belong to its thinking part, up to the one that completes `</think>`.

    Args:
        ending: of the template that the answer is in.
    """
    data = tokenizer.decode_bytes(tokens)
    text = data.decode(errors="replace")
    # A template may begin every answer with an empty thinking part.
    if END not in text or not (has_thinking(ending.opening + text) or has_thinking(ending.begun(text))):
        return 0
    low, high = 0, len(tokens)  # `high` tokens have the end
    while low < high:
        middle = (low + high) // 2
        if END.encode() in tokenizer.decode_bytes(tokens[:middle]):
            high = middle
        else:
            low = middle + 1
    return high
