"""Packing against one pair at a time in plain Python; grouping and sampling against what they promise."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from src.preference.batching import batches_by_tokens, epoch_order, pack_pairs, packed_length

tokens = st.integers(0, 65535)
answers = st.lists(tokens, min_size=1, max_size=6)
pair_lists = st.lists(st.tuples(st.lists(tokens, max_size=6), answers, answers), min_size=1, max_size=5)


@given(pairs=pair_lists)
def test_packing_against_one_sequence_at_a_time(pairs):
    inputs, targets, starts = [], [], [0]
    answer_positions, answer_segment, prompt_positions, prompt_segment = [], [], [], []
    for number, (prompt, chosen, reject) in enumerate(pairs):
        for which, answer in enumerate((chosen, reject)):
            full = prompt + answer if prompt else [0, *answer]
            for place in range(len(full) - 1):
                is_answer = place + 1 >= len(full) - len(answer)
                if is_answer:
                    answer_positions.append(len(inputs))
                    answer_segment.append(2 * number + which)
                elif which == 0:
                    prompt_positions.append(len(inputs))
                    prompt_segment.append(2 * number)
                inputs.append(full[place])
                targets.append(full[place + 1])
            starts.append(len(inputs))
    batch = pack_pairs([(*pair, -1.0, -2.0) for pair in pairs])
    assert batch.tokens.tolist() == inputs and batch.targets.tolist() == targets
    assert batch.cu_seqlens.tolist() == starts and batch.cu_seqlens.dtype == torch.int32
    assert batch.answer_positions.tolist() == answer_positions and batch.answer_segment.tolist() == answer_segment
    assert batch.prompt_positions.tolist() == prompt_positions and batch.prompt_segment.tolist() == prompt_segment
    assert batch.n_sequences == 2 * len(pairs) == len(starts) - 1
    for name in ("tokens", "targets", "answer_positions", "answer_segment", "prompt_positions", "prompt_segment"):
        assert getattr(batch, name).dtype == torch.int64
    assert sum(map(packed_length, pairs)) == len(inputs)


def test_an_answer_is_predicted_whole_even_after_an_empty_prompt():
    batch = pack_pairs([([], [7, 8], [9])])
    assert batch.tokens.tolist() == [0, 7, 0] and batch.targets.tolist() == [7, 8, 9]
    assert batch.answer_segment.tolist() == [0, 0, 1] and batch.prompt_positions.tolist() == []


def test_moving_keeps_the_sequence_starts_on_the_cpu():
    moved = pack_pairs([([1], [2], [3])]).to("meta")
    assert moved.tokens.device.type == moved.answer_segment.device.type == moved.prompt_positions.device.type == "meta"
    assert moved.cu_seqlens.device.type == "cpu" and moved.n_sequences == 2


@given(lengths=st.lists(st.integers(1, 50), max_size=30), limit=st.integers(1, 120))
def test_groups_hold_every_index_once_and_keep_the_limit(lengths, limit):
    groups = batches_by_tokens(lengths, limit)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert all(groups)
    assert all(sum(lengths[index] for index in group) <= limit or len(group) == 1 for group in groups)
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    # No group could have taken in the first of the next: the limit is used up.
    for group, following in pairwise(groups):
        assert sum(lengths[index] for index in group) + lengths[following[0]] > limit


@given(n_pairs=st.integers(1, 20), seed=st.integers(0, 2**40), start=st.integers(0, 100), count=st.integers(0, 50),
       cut=st.integers(0, 50))
def test_the_order_is_the_same_from_any_start(n_pairs, seed, start, count, cut):
    whole = epoch_order(n_pairs, seed, 0, start + count)
    assert epoch_order(n_pairs, seed, start, count) == whole[start:]
    cut = min(cut, count)
    assert epoch_order(n_pairs, seed, start, cut) + epoch_order(n_pairs, seed, start + cut, count - cut) == whole[start:]


@given(n_pairs=st.integers(1, 20), seed=st.integers(0, 1000), number=st.integers(0, 9))
def test_each_pass_is_a_permutation(n_pairs, seed, number):
    assert sorted(epoch_order(n_pairs, seed, number * n_pairs, n_pairs)) == list(range(n_pairs))


@pytest.mark.parametrize("other", [dict(seed=1, start=0), dict(seed=0, start=50)])
def test_passes_and_seeds_differ(other):
    assert epoch_order(50, 0, 0, 50) != epoch_order(50, count=50, **other)
