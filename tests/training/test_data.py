import pytest

from src.preference.packing import packed_length
from src.training.data import PairBatches

PAIRS = [([number], [1] * (1 + number % 4), [2, 3], 0.0, 0.0) for number in range(10)]


def batches(epoch_steps: int = 4, micro_bsz: int = 1, batch_tokens: int = 0, seed: int = 0, first_epoch: int = 0, rank: int = 0,
            world_size: int = 1, pairs=PAIRS) -> PairBatches:
    return PairBatches(pairs, epoch_steps, micro_bsz, batch_tokens, seed, first_epoch, rank, world_size)


def epochs(sampler: PairBatches, numbers) -> list[list[list[int]]]:
    drawn = []
    for number in numbers:
        sampler.set_epoch(number)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(sampler)
    return drawn


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
def test_devices_share_the_pairs_of_an_epoch(epoch_steps, batch_tokens):
    whole, = epochs(batches(epoch_steps, 1, batch_tokens, seed=3), [0])
    parts = [epochs(batches(-(-epoch_steps // 2), 1, batch_tokens, seed=3, rank=rank, world_size=2), [0])[0] for rank in range(2)]
    assert len(parts[0]) == len(parts[1])
    together = sum(map(list, zip(*parts, strict=True)), [])
    assert together[:len(whole)] == whole and together[len(whole):] == whole[:len(together) - len(whole)]


def test_optimizer_steps_are_counted_before_the_first():
    assert batches(5).total_steps(3, 2) == 9
    sampler = batches(0, batch_tokens=12)
    assert sampler.total_steps(3, 2) == sum(-(-len(epoch) // 2) for epoch in epochs(sampler, range(3)))
