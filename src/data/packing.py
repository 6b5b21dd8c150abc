"""The memory layout of pairs and texts: packed end to end, without padding, each prompt once for all of its answers.

A recurrent model can read a sequence from any given state, so sequences of any lengths can follow one another in a
single row of tokens, and several can continue from the end of another. Knows nothing about texts or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, Self

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


@dataclass(frozen=True, eq=False)
class PackedBatch(Movable):
    """Pairs laid out for one forward pass: R prompts, then the 2 B answers chosen 0, reject 0, chosen 1 and so on.

    A prompt's inputs are all its tokens, an answer's all but its last one. A position is an index into the T_total inputs.
    """

    tokens: Tensor  # [T_total] int64, inputs
    cu_seqlens: Tensor  # [R + 2 B + 1] int32, always on the CPU: start of each sequence, then T_total
    parents: Tensor  # [2 B] int64: the prompt of each answer
    answer_positions: Tensor  # [A] int64: for each token of an answer, the position that predicts it
    answer_targets: Tensor  # [A] int64: that token
    answer_of: Tensor  # [A] int64: the answer, 0 .. 2 B - 1, that it belongs to
    prompt_positions: Tensor  # [P] int64: likewise for the prompts' tokens, except the first of each
    prompt_targets: Tensor  # [P] int64
    prompt_of: Tensor  # [P] int64, 0 .. R - 1
    answer_tokens: Tensor  # [2 B] int64: number of predicted tokens of each answer, which is all of them
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


def pack_pairs(pairs: Sequence[tuple], share_prompts: bool = True) -> PackedBatch:
    """Pack pairs whose first three entries are prompt, chosen and reject tokens; answers must not be empty.

    An empty prompt is replaced by end-of-text (0), as it precedes any document's first token, so that all tokens of the answer
    are predicted. The first token of a prompt is not predicted.

    Args:
        share_prompts: False gives each answer its own copy of the prompt, for comparison: the numbers are the same.
    """
    numbers: dict[tuple, int] = {}
    parents, answers = [], []
    for number, (prompt, chosen, reject, *_) in enumerate(pairs):
        prompt = tuple(prompt) or (0,)
        for which, answer in enumerate((chosen, reject)):
            key = prompt if share_prompts else (2 * number + which, prompt)
            parents.append(numbers.setdefault(key, len(numbers)))
            answers.append(answer)
    prompts = list(numbers if share_prompts else (prompt for _, prompt in numbers))

    n_prompt, n_answer = (np.array([len(x) for x in group]) for group in (prompts, answers))
    cu_seqlens = np.concatenate([[0], np.cumsum(np.concatenate([n_prompt, n_answer - 1]))])
    of_prompts = np.fromiter(chain.from_iterable(prompts), np.int64, count=n_prompt.sum())
    of_answers = np.fromiter(chain.from_iterable(answers), np.int64, count=n_answer.sum())

    # An answer's first token is predicted at the end of its prompt, each other one at the token before it.
    answer_of = np.repeat(np.arange(len(answers)), n_answer)
    place = np.arange(len(of_answers)) - np.repeat(np.cumsum(n_answer) - n_answer, n_answer)
    starts, ends = cu_seqlens[len(prompts):-1], cu_seqlens[1:len(prompts) + 1] - 1
    positions = np.where(place > 0, starts[answer_of] + place - 1, ends[np.array(parents)][answer_of])
    is_input = np.ones(len(of_answers), bool)
    is_input[np.cumsum(n_answer) - 1] = False
    prompt_positions = np.delete(np.arange(len(of_prompts)), ends)
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([of_prompts, of_answers[is_input]])),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        parents=torch.tensor(parents, dtype=torch.int64),
        answer_positions=torch.from_numpy(positions),
        answer_targets=torch.from_numpy(of_answers),
        answer_of=torch.from_numpy(answer_of),
        prompt_positions=torch.from_numpy(prompt_positions),
        prompt_targets=torch.from_numpy(of_prompts[prompt_positions + 1]),
        prompt_of=torch.from_numpy(np.delete(np.repeat(np.arange(len(prompts)), n_prompt), ends)),
        answer_tokens=torch.from_numpy(n_answer),
        prompt_tokens=torch.from_numpy((n_prompt - 1)[np.array(parents)]),
    )


def packed_length(pair: tuple, shared: bool = False) -> int:
    """Input tokens of a pair in a batch; with `shared`, in a batch that already has its prompt. A text shares nothing."""
    if isinstance(pair, Text):
        return len(pair.tokens) - 1
    prompt, chosen, reject, *_ = pair
    return len(chosen) + len(reject) - 2 + (0 if shared else max(len(prompt), 1))
