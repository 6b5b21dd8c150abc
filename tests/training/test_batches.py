import pytest

import src.training.batches as micro_batches
from src.data.packing import Text, packed_length
from src.errors import UserError
from src.training.batches import PairBatches

PAIRS = [([number], [1] * (1 + number % 4), [2, 3], 0.0, 0.0) for number in range(10)]


def batches(epoch_steps: int = 4, micro_bsz: int = 1, batch_tokens: int = 0, accumulate: int = 1, seed: int = 0,
            first_epoch: int = 0, world_size: int = 1, pairs=PAIRS) -> PairBatches:
    return PairBatches(pairs, epoch_steps, micro_bsz, batch_tokens, accumulate, seed, first_epoch, world_size)


def epochs(drawn_from: PairBatches, numbers, rank: int = 0) -> list[list[list[int]]]:
    return [[micro_batch.indices for micro_batch in drawn_from.epoch(number, rank)] for number in numbers]


def flat(drawn) -> list[int]:
    return [index for batch in drawn for index in batch]


@pytest.mark.parametrize("batch_tokens", [0, 12])
def test_every_pair_is_seen_once_a_pass_however_epochs_cut_it(batch_tokens):
    drawn = flat(sum(epochs(batches(batch_tokens=batch_tokens), range(6)), []))
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]


@pytest.mark.parametrize("micro_bsz", [1, 3])
@pytest.mark.parametrize("batch_tokens", [0, 12])
def test_an_epoch_of_no_stated_length_is_one_pass(micro_bsz, batch_tokens):
    drawn = epochs(batches(0, micro_bsz, batch_tokens), range(3))
    assert all(sorted(flat(epoch)) == list(range(10)) for epoch in drawn) and drawn[0] != drawn[1]
    if batch_tokens:
        assert all(sum(packed_length(PAIRS[index]) for index in batch) <= 12 for epoch in drawn for batch in epoch)
    else:
        assert all([len(batch) for batch in epoch] == ([1] * 10 if micro_bsz == 1 else [3, 3, 3, 1]) for epoch in drawn)


@pytest.mark.parametrize("epoch_steps", [0, 4])
@pytest.mark.parametrize("batch_tokens", [0, 12])
def test_epoch_begin_goes_on_where_earlier_epochs_ended(batch_tokens, epoch_steps):
    later = epochs(batches(epoch_steps, 2, batch_tokens, first_epoch=2), range(2))
    assert later == epochs(batches(epoch_steps, 2, batch_tokens), range(2, 4))


@pytest.mark.parametrize(("epoch_steps", "batch_tokens"), [(10, 0), (0, 0), (4, 12), (0, 12)])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_pairs_of_an_epoch_and_those_with_none_left_repeat_one_that_counts_for_nothing(
        epoch_steps, batch_tokens, world_size):
    whole, = epochs(batches(epoch_steps, 1, batch_tokens, seed=3), [0])
    shared = batches(-(-epoch_steps // world_size), 1, batch_tokens, seed=3, world_size=world_size)
    parts = [shared.epoch(0, rank) for rank in range(world_size)]
    together = [micro_batch for step in zip(*parts, strict=True) for micro_batch in step]
    assert [micro_batch.indices for micro_batch in together][:len(whole)] == whole
    if not epoch_steps:
        assert [micro_batch.share > 0 for micro_batch in together] == [True] * len(whole) + [False] * (-len(whole) % world_size)
    else:
        assert all(micro_batch.share > 0 for micro_batch in together)


@pytest.mark.parametrize("batch_tokens", [0, 12])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_shares_of_every_step_add_up_to_one(batch_tokens, world_size):
    drawn_from = batches(0, 3, batch_tokens, accumulate=2, world_size=world_size)
    for number in range(3):
        parts = [drawn_from.epoch(number, rank) for rank in range(world_size)]
        for start in range(0, len(parts[0]), 2):
            step = [micro_batch for part in parts for micro_batch in part[start:start + 2]]
            assert sum(micro_batch.share * len(micro_batch.indices) for micro_batch in step) == pytest.approx(1)
            assert len({micro_batch.share for micro_batch in step} - {0}) == 1


def test_in_texts_every_token_that_has_a_loss_counts_once():
    texts = [Text([1, 2, 3], [True, True, False]), Text([1] * 6, [False] * 2 + [True] * 4), Text([5], [True])]
    drawn_from = PairBatches(texts, 0, 1, 0, 2, 0, 0, 1)
    for number in range(3):
        for step in (drawn_from.epoch(number, 0)[:2], drawn_from.epoch(number, 0)[2:]):
            tokens = sum({0: 1, 1: 4, 2: 0}[micro_batch.indices[0]] for micro_batch in step)
            assert all(micro_batch.share == 1 / max(tokens, 1) for micro_batch in step)


def test_optimizer_steps_are_counted_before_the_first():
    assert batches(5, accumulate=2).total_steps(3) == 9
    assert batches(0, 4, accumulate=2, world_size=2).total_steps(3) == 3  # of 10 pairs, two micro-batches and one on each process
    drawn_from = batches(0, batch_tokens=12, accumulate=2)
    assert drawn_from.total_steps(3) == sum(-(-len(epoch) // 2) for epoch in epochs(drawn_from, range(3)))


def test_a_beginning_that_takes_days_to_find_is_refused(monkeypatch):
    monkeypatch.setattr(micro_batches, "MOST_BEFORE", 100)
    assert epochs(batches(10, batch_tokens=12, first_epoch=10), [0])
    with pytest.raises(UserError, match="--epoch_begin 11: with --batch_tokens all 110 micro-batches before it .* lower it"):
        batches(10, batch_tokens=12, first_epoch=11)
    # Where each pass is an epoch, or batches have equally many pairs, nothing has to be made.
    assert epochs(batches(0, batch_tokens=12, first_epoch=10**6), [0]) and epochs(batches(10, first_epoch=10**6), [0])


@pytest.mark.parametrize("batch_tokens", [0, 12])
def test_micro_batches_are_the_same_in_whatever_order_they_are_asked_for(batch_tokens):
    drawn = batches(batch_tokens=batch_tokens, accumulate=3)
    in_turn = [list(drawn.epoch(number, 0)) for number in range(5)]
    at_random = batches(batch_tokens=batch_tokens, accumulate=3)
    for number in (3, 0, 4, 1, 1, 2):
        epoch = at_random.epoch(number, 0)
        for at in (3, 0, 2, 1, 1):
            assert epoch[at] == in_turn[number][at]
        assert epoch[1:3] == in_turn[number][1:3]


@pytest.mark.parametrize("batch_tokens", [0, 12])
@pytest.mark.parametrize("micro_bsz", [1, 3])
def test_a_texts_token_weighs_one_of_all_that_its_step_has(batch_tokens, micro_bsz):
    """Over the borders of passes too; the first token is never predicted, so that it has no loss."""
    texts = [Text([1] * length, [at % 3 != length % 3 for at in range(length)]) for length in range(2, 9)]
    drawn = batches(5, micro_bsz, batch_tokens, accumulate=2, pairs=texts)
    for number in range(6):
        epoch = list(drawn.epoch(number, 0))
        for step in (epoch[:2], epoch[2:4], epoch[4:]):
            count = sum(texts[index].trained[at] for part in step for index in part.indices
                        for at in range(1, len(texts[index].tokens)))
            assert [part.share for part in step] == [1 / max(count, 1)] * len(step)


def test_a_process_that_only_keeps_others_company_computes_one_pair():
    idle = [part for rank in range(3) for part in batches(0, 3, world_size=3).epoch(0, rank) if not part.share]
    assert len(idle) == 2 and all(len(part.indices) == 1 for part in idle)
