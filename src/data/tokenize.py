"""From CSV rows to token pairs: templates, tokenization, and the one rule for pairs that are too long.

Prompt and answer are tokenized apart, the answer as a continuation of the prompt, and their tokens joined. Tokenized as one text,
the token at the border could include the first letters of an answer, and the two answers of a pair would follow different
prompts. Apart, both follow the same tokens, and the prompt's state can be computed once for both. Where no token crosses the
border, both ways give the same tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

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
    """What the rows were turned into. All counts are of pairs, so a row that is used twice counts twice."""

    templates: dict[str, int]  # by the names "user", "question", "input"; of the pairs kept
    cut: int  # pairs kept whose prompt lost its beginning
    dropped: int  # pairs left out, since an answer alone is longer than the limit
    equal: int  # pairs kept whose two answers are the same once cleaned
    longest: int  # tokens of the longest prompt + longer answer among the pairs kept
    changes: Changes  # texts, of prompts and answers, that do not come back from their tokens as written


def walk_rows(n_rows: int, target_pair_count: int | None) -> Iterator[int]:
    """Row indices for each pair: all rows again and again until the target is reached; None means every row once."""
    count = n_rows if target_pair_count is None else target_pair_count
    return (position % n_rows for position in range(count))


def tokenize_pairs(rows: Sequence[Row], tokenizer: Tokenizer, target_pair_count: int | None, max_len: int,
                   seed: int, numbers: Sequence[int] | None = None) -> tuple[list[TokenPair], PairCounts]:
    """Walk the rows, draw a template for each pair, and turn prompt, chosen and reject into tokens.

    A prompt of several turns always has the template "user"; one is drawn all the same, so that other rows' don't depend on it.

    If prompt and longer answer together exceed `max_len` tokens, the prompt loses as much of its beginning as
    needed, down to an empty prompt. If an answer alone exceeds it, the pair is dropped, so that fewer pairs than
    the target are returned. A pair whose answers are equal once cleaned is kept: its margin is always 0, its
    preference gradient vanishes, and only its share of SFT loss trains. It is counted, since a margin of 0 is
    not a win.

    Pairs of the same row and template share their token lists: treat them as read-only. It keeps a `.save` with
    many repetitions small.

    Args:
        rows: with two answers each, or one that has a thumb; the other one's tokens are then [].
        target_pair_count: number of pairs to make; None for each row once.
        max_len: most tokens of prompt and longer answer together.
        seed: of the generator that draws templates; the same seed gives the same pairs.
        numbers: of the rows in their file, for messages; None counts from 1.

    Returns:
        (prompt_tokens, chosen_tokens, reject_tokens) for each pair kept, and the counts.

    Raises:
        UserError: the target is below 1, or no pair is left under the limit.
    """
    if target_pair_count is not None and target_pair_count < 1:
        raise UserError(f"--target_pair_count is {target_pair_count}; it must be at least 1")
    generator, encoder = np.random.default_rng(seed), Encoder(tokenizer)
    numbers = numbers or range(1, len(rows) + 1)

    @cache
    def answers(index: int) -> tuple[list[int], list[int]]:
        # An unpaired answer has none beside it.
        chosen, reject = (encoder.encode(format_answer(text), numbers[index], part, continues=True) if text else []
                          for part, text in zip(("chosen", "reject"), rows[index][1:], strict=True))
        return chosen, reject

    @cache
    def prompt_of(index: int, template: int) -> tuple[list[int], bool]:
        """The prompt's last tokens that fit with the longer answer, and whether the prompt was cut."""
        tokens = encoder.encode(format_prompt(template, rows[index].prompt), numbers[index], "prompt")
        room = max_len - max(map(len, answers(index)))
        return tokens[max(0, len(tokens) - room):], len(tokens) > room

    is_of_turns = cache(lambda index: is_conversation(rows[index].prompt))
    pairs: list[TokenPair] = []
    templates = dict.fromkeys(NAMES, 0)
    cut = dropped = equal = longest = 0
    drawn = 0
    for index in walk_rows(len(rows), target_pair_count):
        # The pairs of one list have one template, so that they share their prompt.
        drawn = drawn if numbers[index] == numbers[index - 1] else draw_template(generator)
        chosen, reject = answers(index)
        longer = max(len(chosen), len(reject))
        if longer > max_len:
            dropped += 1
            continue
        template = 0 if is_of_turns(index) else drawn
        prompt, was_cut = prompt_of(index, template)
        pairs.append((prompt, chosen, reject))
        templates[NAMES[template]] += 1
        cut += was_cut
        equal += chosen == reject
        longest = max(longest, len(prompt) + longer)
    if not pairs:
        raise UserError(f"no pair is left: each of the {dropped} has an answer of over {max_len} tokens; "
                        "raise --rlhf_max_corpus_len")
    return pairs, PairCounts(templates, cut, dropped, equal, longest, encoder.changes())
