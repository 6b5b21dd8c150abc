"""The model's answers to some of the pairs' prompts, before the first step and after each epoch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from src.console import say
from src.data.load_template import ending_of, recorded_in
from src.data.templates import Ending
from src.errors import UserError
from src.model import RWKV
from src.preference.entries import Pair
from src.progress import counting
from src.tokenizer import Tokenizer, load_tokenizer

# (model, tokenizer, prompts' tokens, most tokens of an answer, what ends one) -> each answer's text, and whether it is complete.
Answer = Callable[[RWKV, Tokenizer, Sequence[list[int]], int, Ending], list[tuple[str, bool]]]


class Questions(NamedTuple):
    """Prompts to answer, as tokens, with the texts of the prompts and the chosen answers."""

    tokenizer: Tokenizer
    tokens: list[list[int]]
    texts: list[dict[str, str]]  # "prompt" and "chosen"
    ending: Ending  # of the template that the pairs are in


def read_questions(pairs: Sequence[Pair], count: int, sidecar: dict[str, Any] | None, vocab_size: int) -> Questions | None:
    """The first `count` different prompts, with the tokenizer that the sidecar names, or else the vocabulary's.

    Of pairs of the same prompt it takes the first with a chosen answer, which a thumb down lacks.

    None, with a line on stderr, if that tokenizer can't be loaded or is not the pairs'.
    """
    first: dict[tuple[int, ...], Pair] = {}
    for pair in counting("pairs looked at for samples", pairs):
        prompt = tuple(pair.prompt)
        if len(first) < count if prompt not in first else not first[prompt].chosen:
            first[prompt] = pair
            if len(first) == count and all(pair.chosen for pair in first.values()):
                break
    name = (sidecar or {}).get("tokenizer")
    try:
        tokenizer = load_tokenizer(name if isinstance(name, str) else None, vocab_size)
        ending = ending_of(recorded_in(sidecar))
        texts = [{"prompt": tokenizer.decode(pair.prompt).strip(), "chosen": _chosen(pair.chosen, tokenizer, ending)}
                 for pair in first.values()]
    except UserError as error:
        say(f"warning: no samples in the report, since the pairs' tokenizer can't be used: {error}")
        return None
    return Questions(tokenizer, [pair.prompt for pair in first.values()], texts, ending)


def _chosen(tokens: Sequence[int], tokenizer: Tokenizer, ending: Ending) -> str:
    """An answer's text without what ends it; a turn that it has inside stays.

    Raises UserError if the tokenizer lacks a control word that ends an answer.
    """
    if lacking := [word for word in ending.controls if word not in tokenizer.control]:
        raise UserError(f"--tokenizer {tokenizer.name}: lacks {lacking[0]}, which ends an answer according to the pairs' sidecar")
    ends = {tokenizer.control[word] for word in ending.controls}
    text = ending.begun(tokenizer.decode([token for token in tokens if token not in ends])).strip()
    for stop in ending.stops:
        text = text.removesuffix(stop.strip()) if stop.strip() else text
    return text.strip()
