from src.training.data import PairSampler


def epochs(sampler: PairSampler, numbers) -> list[list[int]]:
    drawn = []
    for number in numbers:
        sampler.set_epoch(number)
        drawn.append(list(sampler))
    return drawn


def test_every_pair_is_seen_once_a_pass_however_epochs_cut_it():
    drawn = sum(epochs(PairSampler(10, 4, 0, 0, 0, 1), range(5)), [])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_epoch_begin_goes_on_where_earlier_epochs_ended():
    assert epochs(PairSampler(10, 4, 0, 2, 0, 1), range(2)) == epochs(PairSampler(10, 4, 0, 0, 0, 1), range(2, 4))


def test_devices_share_the_pairs_of_an_epoch():
    whole, = epochs(PairSampler(10, 10, 3, 0, 0, 1), [0])
    parts = [epochs(PairSampler(10, 5, 3, 0, rank, 2), [0])[0] for rank in range(2)]
    assert sorted(sum(parts, [])) == sorted(whole) == list(range(10))
