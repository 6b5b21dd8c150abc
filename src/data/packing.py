"""The memory layout of pairs and texts: packed end to end, without padding, each prompt once for all of its answers.

A recurrent model can read a sequence from any given state, so sequences of any lengths can follow one another in a
single row of tokens, and several can continue from the end of another. Knows nothing about texts or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Movable:
    """A batch whose tensors move to a device together, except `cu_seqlens`."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with everything except `cu_seqlens` on `device`."""
        moved = {name: x.to(device, non_blocking=True) for name, x in vars(self).items() if name != "cu_seqlens"}
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """The same batch in pinned memory: `to` copies it to a GPU asynchronously."""
        return replace(self, **{name: x.pin_memory() for name, x in vars(self).items()})


class Answered(Protocol):
    """A prompt's tokens with those of two answers. At most one is empty; of each, the tokens before `..._from` have no loss."""

    @property
    def prompt(self) -> list[int]: ...

    @property
    def chosen(self) -> list[int]: ...

    @property
    def reject(self) -> list[int]: ...

    @property
    def chosen_from(self) -> int: ...

    @property
    def reject_from(self) -> int: ...


@dataclass(frozen=True, eq=False)
class PackedBatch(Movable):
    """Pairs laid out for one forward pass: R prompts, then the answers that are not empty, F of the 2 B.

    The answers are chosen 0, reject 0, chosen 1 and so on; an empty one has a number, but no sequence. A prompt's inputs are all
    its tokens, an answer's all but its last one. A position is an index into the T_total inputs.
    """

    tokens: Tensor  # [T_total] int64, inputs
    cu_seqlens: Tensor  # [R + F + 1] int32, always on the CPU: start of each sequence, then T_total
    parents: Tensor  # [F] int64: the prompt of each answer that has a sequence
    answer_positions: Tensor  # [A] int64: for each token of an answer that has a loss, the position that predicts it
    answer_targets: Tensor  # [A] int64: that token
    answer_of: Tensor  # [A] int64: the answer, 0 .. 2 B - 1, that it belongs to
    answer_prompts: Tensor  # [2 B] int64: the prompt of each answer, 0 .. R - 1
    prompt_positions: Tensor  # [P] int64: likewise for the prompts' tokens, except the first of each
    prompt_targets: Tensor  # [P] int64
    prompt_of: Tensor  # [P] int64, 0 .. R - 1
    answer_tokens: Tensor  # [2 B] int64: number of tokens of each answer that have a loss
    prompt_tokens: Tensor  # [2 B] int64: the same for the answer's prompt, all but the first

    @property
    def n_prompts(self) -> int:
        return len(self.cu_seqlens) - 1 - len(self.parents)


class Text(NamedTuple):
    """A sequence to be predicted token by token."""

    tokens: list[int]
    trained: list[bool]  # for each token, whether its prediction has a loss; the first is not predicted


@dataclass(frozen=True, eq=False)
class TextBatch(Movable):
    """S texts laid out for one forward pass; the inputs of each are all its tokens but the last."""

    tokens: Tensor  # [T_total] int64, inputs
    cu_seqlens: Tensor  # [S + 1] int32, always on the CPU: start of each text, then T_total
    positions: Tensor  # [A] int64: for each token that has a loss, the position that predicts it
    targets: Tensor  # [A] int64: that token


def pack_texts(texts: Sequence[Text]) -> TextBatch:
    """Pack texts of at least one token each."""
    inputs = np.fromiter(chain.from_iterable(text.tokens[:-1] for text in texts), np.int64)
    targets = np.fromiter(chain.from_iterable(text.tokens[1:] for text in texts), np.int64)
    positions = np.flatnonzero(np.fromiter(chain.from_iterable(text.trained[1:] for text in texts), bool))
    borders = np.cumsum([0, *(len(text.tokens) - 1 for text in texts)])
    return TextBatch(torch.from_numpy(inputs), torch.from_numpy(borders.astype(np.int32)), torch.from_numpy(positions),
                     torch.from_numpy(targets[positions]))


def pack_pairs(pairs: Sequence[Answered], share_prompts: bool = True) -> PackedBatch:
    """Pack pairs of which at least one answer is not empty.

    An empty prompt is replaced by end-of-text (0), as it precedes any document's first token, so that all tokens of the answer
    are predicted. The first token of a prompt is not predicted.

    Args:
        share_prompts: False gives each answer its own copy of the prompt, for comparison: the numbers are the same.
    """
    numbers: dict[tuple, int] = {}
    answer_prompts, answers, numbers_of_answers, starts_of_loss = [], [], [], []
    for number, pair in enumerate(pairs):
        prompt = tuple(pair.prompt) or (0,)
        for which, answer, start in ((0, pair.chosen, pair.chosen_from), (1, pair.reject, pair.reject_from)):
            copy = which if pair.chosen and pair.reject else 0
            key = prompt if share_prompts else (2 * number + copy, prompt)
            answer_prompts.append(numbers.setdefault(key, len(numbers)))
            if answer:
                answers.append(answer)
                numbers_of_answers.append(2 * number + which)
                starts_of_loss.append(start)
    prompts = list(numbers if share_prompts else (prompt for _, prompt in numbers))
    prompt_of, parents = np.array(answer_prompts), np.array(answer_prompts)[numbers_of_answers]

    n_prompt, n_answer = (np.array([len(x) for x in group]) for group in (prompts, answers))
    cu_seqlens = np.concatenate([[0], np.cumsum(np.concatenate([n_prompt, n_answer - 1]))])
    of_prompts = np.fromiter(chain.from_iterable(prompts), np.int64, count=n_prompt.sum())
    of_answers = np.fromiter(chain.from_iterable(answers), np.int64, count=n_answer.sum())

    # An answer's first token is predicted at the end of its prompt, each other one at the token before it.
    sequence = np.repeat(np.arange(len(answers)), n_answer)
    place = np.arange(len(of_answers)) - np.repeat(np.cumsum(n_answer) - n_answer, n_answer)
    starts, ends = cu_seqlens[len(prompts):-1], cu_seqlens[1:len(prompts) + 1] - 1
    positions = np.where(place > 0, starts[sequence] + place - 1, ends[parents][sequence])
    is_input = np.ones(len(of_answers), bool)
    is_input[np.cumsum(n_answer) - 1] = False
    has_loss = place >= np.array(starts_of_loss)[sequence]
    answer_of = np.array(numbers_of_answers)[sequence[has_loss]]
    prompt_positions = np.delete(np.arange(len(of_prompts)), ends)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([of_prompts, of_answers[is_input]])),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        parents=torch.from_numpy(parents),
        answer_positions=torch.from_numpy(positions[has_loss]),
        answer_targets=torch.from_numpy(of_answers[has_loss]),
        answer_of=torch.from_numpy(answer_of),
        answer_prompts=torch.from_numpy(prompt_of),
        prompt_positions=torch.from_numpy(prompt_positions),
        prompt_targets=torch.from_numpy(of_prompts[prompt_positions + 1]),
        prompt_of=torch.from_numpy(np.delete(np.repeat(np.arange(len(prompts)), n_prompt), ends)),
        answer_tokens=torch.from_numpy(np.bincount(answer_of, minlength=2 * len(pairs))),
        prompt_tokens=torch.from_numpy((n_prompt - 1)[prompt_of]),
    )


class Sizes(NamedTuple):
    """Input tokens of pairs or texts in a batch, so that batches can be planned without any tokens."""

    prompt: np.ndarray  # [n] int64, of its prompt, which pairs in a batch share if it is the same; 0 for a text
    rest: np.ndarray  # [n] int64, of its answers, or of the text
    same: np.ndarray  # [n], equal for equal prompts; different for all texts

    @property
    def alone(self) -> np.ndarray:
        """[n] int64, in a batch that does not have its prompt."""
        return self.prompt + self.rest


def sizes_of(items: Sequence[tuple]) -> Sizes:
    """The sizes of pairs or of texts; sequences in files know theirs, so that nothing is read."""
    if hasattr(items, "sizes"):
        return items.sizes()
    if items and isinstance(items[0], Text):
        return sizes_of_texts(np.fromiter((len(text[0]) for text in items), np.int64, len(items)))
    prompts: dict[tuple[int, ...], int] = {}
    found = [(max(len(item[0]), 1), packed_length(item, shared=True), prompts.setdefault(tuple(item[0]), len(prompts)))
             for item in items]
    return Sizes(*np.array(found, np.int64).reshape(len(items), 3).T)


def sizes_of_pairs(prompt: np.ndarray, chosen: np.ndarray, reject: np.ndarray, same: np.ndarray) -> Sizes:
    """Of pairs with so many tokens; `same` is equal for equal prompts."""
    return Sizes(np.maximum(prompt, 1), np.maximum(chosen - 1, 0) + np.maximum(reject - 1, 0), same)


def sizes_of_texts(lengths: np.ndarray) -> Sizes:
    """Of texts of so many tokens."""
    return Sizes(np.zeros_like(lengths), lengths - 1, np.arange(len(lengths)))


def packed_length(pair: tuple, shared: bool = False) -> int:
    """Input tokens of a pair in a batch; with `shared`, in a batch that already has its prompt. A text shares nothing."""
    if isinstance(pair, Text):
        return len(pair.tokens) - 1
    prompt, chosen, reject, *_ = pair
    return max(len(chosen) - 1, 0) + max(len(reject) - 1, 0) + (0 if shared else max(len(prompt), 1))
