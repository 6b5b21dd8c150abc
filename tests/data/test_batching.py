"""Grouping and order against what they promise."""

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.batching import batches_by_tokens, batches_from, epoch_order, pass_by_tokens
from src.data.packing import pack_pairs, packed_length
from src.data.token_lists import TokenPair

# Few prompts, so that many pairs share theirs.
prompts = st.sampled_from([[], [1], [2] * 7, [3] * 20])
answers = st.integers(1, 30).map(lambda length: [4] * length)
pair_lists = st.lists(st.tuples(prompts, answers, answers), max_size=30)


def size(pairs: list[tuple], group: list[int]) -> int:
    return len(pack_pairs([TokenPair(*pairs[index][:3]) for index in group]).tokens)


@given(pairs=pair_lists, limit=st.integers(1, 200))
def test_groups_hold_every_index_once_and_keep_the_limit(pairs, limit):
    groups = batches_by_tokens(pairs, limit)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(pairs)))
    assert all(groups)
    assert all(size(pairs, group) <= limit or len(group) == 1 for group in groups)
    # No group could have taken in the first of the next: the limit is used up.
    assert all(size(pairs, [*group, following[0]]) > limit for group, following in zip(groups, groups[1:], strict=False))
    if flat:
        assert packed_length(pairs[flat[0]]) == max(map(packed_length, pairs))


def test_pairs_of_one_prompt_come_together():
    pairs = [([1, 2, 3], [4] * n, [5]) for n in range(1, 6)] + [([6, 7], [8] * n, [9]) for n in range(1, 6)]
    assert [sorted(index // 5 for index in group) for group in batches_by_tokens(pairs, 18)] == [[0] * 5, [1] * 5]


@given(pairs=pair_lists.filter(len), seed=st.integers(0, 1000), number=st.integers(0, 9), limit=st.integers(1, 200))
def test_a_pass_by_tokens_sees_every_pair_once(pairs, seed, number, limit):
    batches = pass_by_tokens(pairs, seed, number, limit)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    assert all(size(pairs, batch) <= limit or len(batch) == 1 for batch in batches)


@given(pairs=pair_lists.filter(len), seed=st.integers(0, 1000), start=st.integers(0, 40))
def test_batches_by_tokens_are_the_same_from_any_start(pairs, seed, start):
    passes = [batch for number in range(60) for batch in pass_by_tokens(pairs, seed, number, 50)]
    assert list(islice(batches_from(pairs, seed, 50, start), 5)) == passes[start:start + 5]


def test_batches_hold_like_lengths_and_come_in_no_order_of_length():
    pairs = [([number], [0] * (1 + number * 37 % 101), [0]) for number in range(300)]
    lengths = [[packed_length(pairs[index]) for index in batch] for batch in pass_by_tokens(pairs, 0, 0, 400)]
    assert max(max(batch) - min(batch) for batch in lengths) < 20
    assert [max(batch) for batch in lengths] != sorted((max(batch) for batch in lengths), reverse=True)


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
