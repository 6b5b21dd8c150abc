"""What the model answers to a few of the pairs' prompts, before the first step and after each epoch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from src.console import say
from src.errors import UserError
from src.model import RWKV
from src.preference.pairs import Pair
from src.tokenizer import Tokenizer, load_tokenizer

# (model, tokenizer, prompts' tokens, most tokens of an answer) -> each answer's text, and whether it came to its end.
Answer = Callable[[RWKV, Tokenizer, Sequence[list[int]], int], list[tuple[str, bool]]]


class Questions(NamedTuple):
    """Prompts to be answered, as tokens and with their own and the chosen answers' texts."""

    tokenizer: Tokenizer
    tokens: list[list[int]]
    texts: list[dict[str, str]]  # "prompt" and "chosen"


def read_questions(pairs: Sequence[Pair], count: int, sidecar: dict[str, Any] | None, vocab_size: int) -> Questions | None:
    """The first `count` pairs whose prompts differ, by the tokenizer that the sidecar names, or else the vocabulary's.

    None, and a line that says so, where that tokenizer is not to be had or is not that of the pairs.
    """
    first: dict[tuple[int, ...], Pair] = {}
    for pair in pairs:
        if len(first) < count:
            first.setdefault(tuple(pair[0]), pair)
    name = (sidecar or {}).get("tokenizer")
    try:
        tokenizer = load_tokenizer(name if isinstance(name, str) else None, vocab_size)
        texts = [{"prompt": tokenizer.decode(pair[0]).strip(), "chosen": tokenizer.decode(pair[1]).strip()}
                 for pair in first.values()]
    except UserError as error:
        say(f"warning: no samples in the report, for want of the pairs' tokenizer: {error}")
        return None
    return Questions(tokenizer, [pair[0] for pair in first.values()], texts)
