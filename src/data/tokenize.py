"""From CSV rows to token pairs: templates, tokenization, and the one rule for pairs that are too long.

Prompt and answer are tokenized apart, the answer as what continues the prompt, and their tokens joined. Tokenized as one text,
the token at the border could swallow the first letters of an answer, and the two answers of a pair would then follow different
prompts; apart, both follow the very same tokens, and the prompt's state can be computed once for both. Where no token reaches
across the border, both ways give the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from src.data.conversation import is_conversation
from src.data.rows import Row
from src.data.templates import NAMES, draw_template, format_answer, format_prompt
from src.errors import UserError
from src.tokenizer import Tokenizer
from src.tokenizer.fidelity import Changes, Encoder

TokenPair = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class PairCounts:
    """What became of the rows. All counts are of pairs, so that a row walked twice counts twice."""

    templates: dict[str, int]  # by the names "user", "question", "input"; of the pairs kept
    cut: int  # pairs kept whose prompt lost its beginning
    dropped: int  # pairs left out since an answer alone is longer than the limit
    equal: int  # pairs kept whose two answers are the same once cleaned
    longest: int  # tokens of the longest prompt + longer answer among the pairs kept
    changes: Changes  # texts, of prompts and answers, that do not come back from their tokens as written


def walk_rows(n_rows: int, target_pair_count: int | None) -> Iterator[int]:
    """Row indices for each pair: round and round until the target is reached; None means every row once."""
    count = n_rows if target_pair_count is None else target_pair_count
    return (position % n_rows for position in range(count))


def tokenize_pairs(rows: Sequence[Row], tokenizer: Tokenizer, target_pair_count: int | None, max_len: int,
                   seed: int, numbers: Sequence[int] | None = None) -> tuple[list[TokenPair], PairCounts]:
    """Walk the rows, draw a template for each pair, and turn prompt, chosen and reject into tokens.

    A prompt of several turns has the template "user" whatever is drawn for it, so that other rows' templates don't depend on it.

    Where prompt and longer answer together exceed `max_len` tokens, the prompt loses its beginning until they
    don't, down to an empty prompt; where an answer alone exceeds it, the pair is dropped, so that fewer pairs
    than the target come back. A pair whose answers are equal once cleaned is kept: its margin is always 0,
    its preference gradient vanishes, and only its share of SFT loss trains; it is counted, since a margin of
    0 is no pair won.

    Pairs of the same row and template share their token lists: treat them as read-only. A `.save` of many
    rounds stays small by it.

    Args:
        rows: with a reject in each.
        target_pair_count: how many pairs to walk; None for each row once.
        max_len: tokens of prompt and longer answer together, at most.
        seed: of the generator that draws templates; the same seed gives the same pairs.
        numbers: of the rows in their file, for messages; counted from 1 where not given.

    Returns:
        (prompt_tokens, chosen_tokens, reject_tokens) for each pair kept, and the counts.

    Raises:
        UserError: the target is below 1, or no pair is left under the limit.
    """
    if target_pair_count is not None and target_pair_count < 1:
        raise UserError(f"--target_pair_count is {target_pair_count}; it must be at least 1")
    generator, encoder = np.random.default_rng(seed), Encoder(tokenizer)
    numbers = numbers or range(1, len(rows) + 1)
    answers: dict[int, tuple[list[int], list[int]]] = {}
    conversations: set[int] = set()
    prompts: dict[tuple[int, int], tuple[list[int], bool]] = {}
    pairs: list[TokenPair] = []
    template_counts = dict.fromkeys(NAMES, 0)
    cut = dropped = equal = longest = 0
    for index in walk_rows(len(rows), target_pair_count):
        row, template = rows[index], draw_template(generator)
        if index not in answers:
            answers[index] = (encoder.encode(format_answer(row.chosen), numbers[index], "chosen", continues=True),
                              encoder.encode(format_answer(row.reject), numbers[index], "reject", continues=True))
            if is_conversation(row.prompt):
                conversations.add(index)
        if index in conversations:
            template = 0
        chosen, reject = answers[index]
        longer = max(len(chosen), len(reject))
        room = max_len - longer
        if room < 0:
            dropped += 1
            continue
        if (index, template) not in prompts:
            prompt = encoder.encode(format_prompt(template, row.prompt), numbers[index], "prompt")
            prompts[index, template] = prompt[max(0, len(prompt) - room):], len(prompt) > room
        prompt, was_cut = prompts[index, template]
        pairs.append((prompt, chosen, reject))
        template_counts[NAMES[template]] += 1
        cut += was_cut
        equal += chosen == reject
        longest = max(longest, len(prompt) + longer)
    if not pairs:
        raise UserError(f"no pair is left: each of the {dropped} has an answer of over {max_len} tokens; "
                        "raise --rlhf_max_corpus_len")
    return pairs, PairCounts(template_counts, cut, dropped, equal, longest, encoder.changes())
