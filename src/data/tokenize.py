"""From CSV rows to token pairs: templates, tokenization, and the one rule for pairs that are too long.

Prompt and answer are tokenized apart, the answer as a continuation of the prompt, and their tokens joined. Tokenized as one text,
the token at the border could include the first letters of an answer, and the two answers of a pair would follow different
prompts. Apart, both follow the same tokens, and the prompt's state can be computed once for both. Where no token crosses the
border, both ways give the same tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from src.data.conversation import is_conversation
from src.data.fit import render_ahead
from src.data.rows import Row
from src.data.spill import Numbers
from src.data.templates import CLASSIC, Piece, Template, answer_pieces, draw_form, prompt_pieces, text_of
from src.data.thinking import thinking_tokens
from src.data.token_lists import SharedLists, TokenPairs
from src.errors import UserError
from src.progress import bar_if_long
from src.tokenizer import Tokenizer
from src.tokenizer.fidelity import Changes, Encoder

Item = TypeVar("Item")


@dataclass(frozen=True)
class PairCounts:
    """What the rows were turned into. All counts are of pairs, so a row that is used twice counts twice."""

    templates: dict[str, int]  # by the names of the template's forms; of the pairs kept
    cut: int  # pairs kept whose prompt lost its beginning
    dropped: int  # pairs left out, since an answer alone is longer than the limit
    equal: int  # pairs kept whose two answers are the same once cleaned
    longest: int  # tokens of the longest prompt + longer answer among the pairs kept
    rows: Sequence[int]  # the index of each kept pair's row
    changes: Changes  # texts, of prompts and answers, that do not come back from their tokens as written


def walk_rows(n_rows: int, target_pair_count: int | None) -> Iterator[int]:
    """Row indices for each pair: all rows again and again until the target is reached; None means every row once."""
    count = n_rows if target_pair_count is None else target_pair_count
    return (position % n_rows for position in range(count))


def tokenize_pairs(rows: Sequence[Row], tokenizer: Tokenizer, target_pair_count: int | None, max_len: int,
                   seed: int, numbers: Sequence[int] | None = None, template: Template = CLASSIC,
                   loss_on: str = "all") -> tuple[TokenPairs, PairCounts]:
    """Walk the rows, draw one of the template's forms for each pair, and turn prompt, chosen and reject into tokens.

    A prompt of several turns always has the first form; one is drawn all the same, so that other rows' don't depend on it.

    If prompt and longer answer together exceed `max_len` tokens, the prompt loses as much of its beginning as
    needed, down to an empty prompt; an end-of-text token at its beginning stays as long as any token does. If an answer alone
    exceeds it, the pair is dropped, so that fewer pairs than the target are returned. A pair whose answers are equal is kept:
    its margin is always 0, its preference gradient vanishes, and only its share of SFT loss trains. It is counted, since a margin
    of 0 is not a win.

    Pairs of the same row and form share their token lists, which keeps a `.save` with many repetitions small.

    Args:
        rows: with two answers each, or one that has a thumb; the other one's tokens are then [].
        target_pair_count: number of pairs to make; None for each row once.
        max_len: most tokens of prompt and longer answer together.
        seed: of the generator that draws forms; the same seed gives the same pairs.
        numbers: of the rows in their file, for messages; None counts from 1.
        loss_on: "answer" leaves the thinking part of an answer out of its loss.

    Returns:
        a TokenPair for each pair kept, and the counts.

    Raises:
        UserError: the target is below 1, or no pair is left under the limit.
    """
    if target_pair_count is not None and target_pair_count < 1:
        raise UserError(f"--target_pair_count is {target_pair_count}; it must be at least 1")
    generator = np.random.default_rng(seed)
    numbers = numbers or range(1, len(rows) + 1)
    tokenized = _Tokenized(rows, numbers, tokenizer, max_len, template, loss_on)
    pairs = TokenPairs(tokenized.lists)
    forms: Counter[str] = Counter(dict.fromkeys(template.forms, 0))
    of_pairs = Numbers()
    cut = dropped = equal = longest = 0
    drawn = 0
    count = len(rows) if target_pair_count is None else target_pair_count
    with bar_if_long("rows to tokens", count) as advance:
        for index in walk_rows(len(rows), target_pair_count):
            render_ahead(template, rows, index)
            advance(1)
            # The pairs of one list have one form, so that they share their prompt.
            drawn = drawn if index and numbers[index] == numbers[index - 1] else draw_form(template, generator)
            answers = tokenized.answers(index)
            if answers.longer > max_len:
                dropped += 1
                continue
            form = 0 if answers.is_of_turns else drawn
            prompt, was_cut = tokenized.prompt(index, form, answers.longer)
            pairs.append(prompt, answers.chosen, answers.reject, answers.chosen_from, answers.reject_from)
            of_pairs.append(index)
            forms[template.forms[form]] += 1
            cut += was_cut
            equal += answers.are_equal
            longest = max(longest, tokenized.lists.length(prompt) + answers.longer)
    if not pairs:
        raise UserError(f"no pair is left: each of the {dropped} has an answer of over {max_len} tokens; "
                        "raise --rlhf_max_corpus_len")
    changes = tokenized.encoder.changes()
    return pairs, PairCounts(dict(forms), cut, dropped, equal, longest, of_pairs, changes)


class _Answers(NamedTuple):
    """A row's two answers, by their numbers among all lists of tokens."""

    chosen: int
    reject: int
    chosen_from: int
    reject_from: int
    longer: int  # tokens of the longer one
    are_equal: bool
    is_of_turns: bool  # the row's prompt


class _Tokenized:
    """Rows as tokens, each text tokenized when it is first needed, and only then."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int], tokenizer: Tokenizer, max_len: int, template: Template,
                 loss_on: str):
        self._numbers, self._max_len, self._template, self._loss_on = numbers, max_len, template, loss_on
        self.encoder, self.lists = Encoder(tokenizer), SharedLists(tokenizer.vocab_size)
        self._row = lru_cache(maxsize=1)(rows.__getitem__)  # several texts of a row are read one after another
        self._answers = np.full((len(rows), len(_Answers._fields)), -1, np.int32)
        self._prompts = np.full((len(rows), len(template.forms)), -1, np.int32)
        self._cut = np.zeros(self._prompts.shape, bool)

    def answers(self, index: int) -> _Answers:
        if self._answers[index, 0] < 0:
            self._answers[index] = self._new_answers(index)
        return _Answers._make(self._answers[index].tolist())

    def prompt(self, index: int, form: int, longer: int) -> tuple[int, bool]:
        """The number of the prompt's tokens that fit with the longer answer, and whether the prompt was cut."""
        if self._prompts[index, form] < 0:
            pieces = prompt_pieces(self._template, self._row(index).prompt, form)
            tokens = encode_pieces(pieces, self.encoder, self._numbers[index], "prompt")
            room = self._max_len - longer
            self._prompts[index, form] = self.lists.append(cut_beginning(tokens, room, self._template.begins_with_end_of_text))
            self._cut[index, form] = len(tokens) > room
        return int(self._prompts[index, form]), bool(self._cut[index, form])

    def _new_answers(self, index: int) -> _Answers:
        row, number = self._row(index), self._numbers[index]
        chosen, reject = (encode_answer(self._template, row.prompt, text, self.encoder, number, part)
                          for text, part in ((row.chosen, "chosen"), (row.reject, "reject")))
        ending = self._template.ending
        chosen_from, reject_from = (0 if self._loss_on == "all" else thinking_tokens(tokens, ending, self.encoder.tokenizer)
                                    for tokens in (chosen, reject))
        return _Answers(self.lists.append(chosen), self.lists.append(reject), chosen_from, reject_from,
                        max(len(chosen), len(reject)), chosen == reject, is_conversation(row.prompt))


def encode_answer(template: Template, prompt: str, answer: str, encoder: Encoder, row: int, part: str) -> list[int]:
    """The tokens of an answer with what ends it; none for an empty one."""
    if not answer.strip():
        return []
    return encode_pieces(answer_pieces(template, prompt, answer), encoder, row, part, continues=True)


def encode_pieces(pieces: Sequence[Piece], encoder: Encoder, row: int, part: str, continues: bool = False) -> list[int]:
    """Tokens of consecutive pieces; `continues` says whether text comes before them."""
    tokens: list[int] = []
    for number, piece in enumerate(pieces):
        if piece.is_control:
            tokens.append(encoder.control(piece.text))
        else:
            tokens += encoder.encode(piece.text, row, part, continues or bool(text_of(pieces[:number])))
    return tokens


def cut_beginning(tokens: list[Item], room: int, keep_first: bool) -> list[Item]:
    """The last `room` tokens; with `keep_first` the first token and the last `room` - 1."""
    if len(tokens) <= room:
        return tokens
    return tokens[:1] + tokens[len(tokens) - room + 1:] if keep_first and room else tokens[len(tokens) - room:]
