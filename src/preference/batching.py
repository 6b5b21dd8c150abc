"""Which pairs go together, in what order, and how they lie in memory: packed end to end, without padding.

A recurrent model starts each sequence from a fresh state, so sequences of any lengths can stand one after the
other in a single row of tokens, with `cu_seqlens` saying where each begins. Knows nothing of texts or models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Pairs laid out for one forward pass: sequences chosen 0, reject 0, chosen 1, reject 1, and so on.

    A position is an index into the T_total inputs; its target is the token that follows it in its sequence.
    """

    tokens: Tensor  # [T_total] int64, inputs
    cu_seqlens: Tensor  # [S + 1] int32, always on the CPU: start of each sequence, then T_total
    targets: Tensor  # [T_total] int64
    answer_positions: Tensor  # [A] int64: positions whose target is an answer's token
    answer_segment: Tensor  # [A] int64: the sequence, 0 .. S - 1, that each of them lies in
    prompt_positions: Tensor  # [P] int64: positions in chosen sequences whose target is a prompt's token
    prompt_segment: Tensor  # [P] int64
    n_sequences: int  # S, twice the number of pairs

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with everything but `cu_seqlens` on `device`."""
        names = ("tokens", "targets", "answer_positions", "answer_segment", "prompt_positions", "prompt_segment")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def pack_pairs(pairs: Sequence[tuple]) -> PackedBatch:
    """Pack pairs whose first three entries are prompt, chosen and reject tokens; answers must not be empty.

    A sequence's inputs are `(prompt + answer)[:-1]`. Nothing predicts the first token of a prompt. Where the
    prompt is empty, end-of-text (0) stands before the answer, as before any document's first token, so that
    all tokens of the answer are predicted: the inputs are `[0] + answer[:-1]`.
    """
    parts, prompt_lengths, lengths = [], [], []
    for prompt, chosen, reject, *_ in pairs:
        prompt = prompt or [0]
        for answer in (chosen, reject):
            parts += prompt, answer
            prompt_lengths.append(len(prompt))
            lengths.append(len(prompt) + len(answer))
    ends = np.cumsum(lengths)
    flat = np.fromiter(chain.from_iterable(parts), np.int64, count=ends[-1])
    is_input, is_target = np.ones(len(flat), bool), np.ones(len(flat), bool)
    is_input[ends - 1] = False
    is_target[ends - lengths] = False

    n_inputs = np.array(lengths) - 1
    cu_seqlens = np.concatenate([[0], np.cumsum(n_inputs)])
    segment = np.repeat(np.arange(len(lengths)), n_inputs)
    place_in_sequence = np.arange(len(segment)) - cu_seqlens[segment]
    targets_answer = place_in_sequence >= np.array(prompt_lengths)[segment] - 1
    answer_positions = np.flatnonzero(targets_answer)
    prompt_positions = np.flatnonzero(~targets_answer & (segment % 2 == 0))
    return PackedBatch(
        tokens=torch.from_numpy(flat[is_input]),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        targets=torch.from_numpy(flat[is_target]),
        answer_positions=torch.from_numpy(answer_positions),
        answer_segment=torch.from_numpy(segment[answer_positions]),
        prompt_positions=torch.from_numpy(prompt_positions),
        prompt_segment=torch.from_numpy(segment[prompt_positions]),
        n_sequences=len(lengths),
    )


def packed_length(pair: tuple) -> int:
    """How many input tokens `pack_pairs` makes of a pair, both its sequences together."""
    prompt, chosen, reject, *_ = pair
    return 2 * (max(len(prompt), 1) - 1) + len(chosen) + len(reject)


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Split the indices of `lengths` into groups of at most `batch_tokens` in total, longest first.

    Lengths within a group are alike. An item longer than `batch_tokens` is a group of its own. Every index
    occurs exactly once; the longest come first, so that what does not fit in memory fails at the start.
    """
    groups: list[list[int]] = []
    total = 0
    for index in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if not groups or total + lengths[index] > batch_tokens:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += lengths[index]
    return groups


def epoch_order(n_pairs: int, seed: int, start: int, count: int) -> list[int]:
    """Positions start .. start + count - 1 of an endless sequence of pair indices, pass after pass.

    Each pass over the data is a permutation of its own, drawn from the seed and the pass's number alone, so
    that each pair is seen once a pass and any part of the sequence can be had without what comes before it:
    a run that resumes at a position goes on with the very pairs that an unbroken run would see.
    """
    first, last = start // n_pairs, (start + count - 1) // n_pairs
    order = chain.from_iterable(np.random.default_rng([seed, number]).permutation(n_pairs).tolist()
                                for number in range(first, last + 1))
    return list(order)[start - first * n_pairs:][:count]
