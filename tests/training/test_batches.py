from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import src.training.batches as micro_batches
from src.data.packing import Text, pack_pairs, pack_texts, packed_length
from src.data.token_lists import TokenPair
from src.errors import UserError
from src.preference.entries import Pair
from src.training.batches import PairBatches, TrainingData, collate

PAIRS = [Pair([number], [1] * (1 + number % 4), [2, 3], 0.0, 0.0) for number in range(10)]


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


@pytest.mark.parametrize("first_epoch", [1, 2])
@pytest.mark.parametrize("epoch_steps", [0, 4])
@pytest.mark.parametrize("batch_tokens", [0, 12])
def test_epoch_begin_goes_on_where_earlier_epochs_ended(batch_tokens, epoch_steps, first_epoch):
    later = epochs(batches(epoch_steps, 2, batch_tokens, first_epoch=first_epoch), range(2))
    assert later == epochs(batches(epoch_steps, 2, batch_tokens), range(first_epoch + 2))[first_epoch:]


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
    # Passes over many pairs of different lengths differ in theirs.
    many = [([1], [1] * (1 + number * number % 97), [2], 0.0, 0.0) for number in range(600)]
    drawn_from = batches(0, batch_tokens=200, pairs=many)
    lengths = [len(epoch) for epoch in epochs(drawn_from, range(9))]
    assert drawn_from.total_steps(9) == sum(lengths) != 9 * lengths[0]
    halved = batches(0, batch_tokens=200, accumulate=2, pairs=many)
    assert halved.total_steps(9) == sum(-(-length // 2) for length in lengths)


def test_a_beginning_that_takes_days_to_find_is_refused(monkeypatch):
    batches(10, batch_tokens=12, first_epoch=10**5)  # minutes are no reason
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


@pytest.mark.parametrize("accumulate", [2, 7])
@pytest.mark.parametrize("batch_tokens", [0, 12])
@pytest.mark.parametrize("micro_bsz", [1, 3])
def test_a_texts_token_weighs_one_of_all_that_its_step_has(batch_tokens, micro_bsz, accumulate):
    """Over the borders of passes too, and in steps of several passes; the first token is never predicted: it has no loss."""
    texts = [Text([1] * length, [at % 3 != length % 3 for at in range(length)]) for length in range(2, 9)]
    drawn = batches(12, micro_bsz, batch_tokens, accumulate=accumulate, pairs=texts)
    for number in range(6):
        epoch = list(drawn.epoch(number, 0))
        for step in (epoch[start:start + accumulate] for start in range(0, 12, accumulate)):
            count = sum(texts[index].trained[at] for part in step for index in part.indices
                        for at in range(1, len(texts[index].tokens)))
            assert [part.share for part in step] == [1 / max(count, 1)] * len(step)


def test_a_process_that_only_keeps_others_company_computes_one_pair():
    for pairs in (PAIRS, PAIRS[:2]):  # two of three have nothing to do in the last of four batches, or in the only one
        idle = [part for rank in range(3) for part in batches(0, 3, world_size=3, pairs=pairs).epoch(0, rank) if not part.share]
        assert len(idle) == 2 and all(len(part.indices) == 1 for part in idle)


def test_an_epoch_ends():
    epoch = batches(5).epoch(0, 0)
    assert len(epoch) == len(list(epoch)) == 5
    for at in (5, -1):
        with pytest.raises(IndexError):
            epoch[at]


@pytest.mark.parametrize("epoch_steps", [0, 7])
def test_in_order_no_batch_is_made_twice(monkeypatch, epoch_steps):
    """Neither for its length, nor for the step's share, nor for the epoch after."""
    made, passes = [], micro_batches.pass_by_tokens

    def counted(pairs, seed, number, batch_tokens):
        made.append(number)
        return passes(pairs, seed, number, batch_tokens)

    monkeypatch.setattr(micro_batches, "pass_by_tokens", counted)
    monkeypatch.setattr("src.data.batching.pass_by_tokens", counted)
    drawn_from = batches(epoch_steps, batch_tokens=12, accumulate=3)
    for number in range(4):
        assert len(list(drawn_from.epoch(number, 0))) == len(drawn_from.epoch(number, 0))
    assert made == list(range(len(made))) and len(made) >= 4


def test_a_steps_losses_are_counted_once(monkeypatch):
    drawn_from, counted = batches(7, accumulate=3), []
    losses = drawn_from.draw.losses
    monkeypatch.setattr(drawn_from.draw, "losses", lambda *part: counted.append(part) or losses(*part))
    list(drawn_from.epoch(1, 0))
    assert counted == [(1, 0, 3), (1, 3, 6), (1, 6, 7)]


@pytest.fixture
def bars(monkeypatch):
    """The progress bars shown, each [what, total, done]."""
    shown = []

    def bar(what, total):
        shown.append([what, total, 0])

        def advance(count):
            shown[-1][2] += count

        return nullcontext(advance)

    monkeypatch.setattr(micro_batches, "progress_bar", bar)
    return shown


def test_counting_steps_for_seconds_has_a_bar(bars):
    many = PAIRS * 100
    for epochs_, shown in ((100, []), (101, [["counting the steps of epochs", 101, 101]])):
        batches(0, batch_tokens=1000, pairs=many).total_steps(epochs_)
        assert bars == shown


def test_finding_a_distant_epoch_has_a_bar(bars):
    few = PAIRS[:1] * 1000
    for number, shown in ((1001, []), (1002, [["finding where the epoch begins, batch", 100_100, 100_100]])):
        drawn_from = batches(100, batch_tokens=1, pairs=few)
        epochs(drawn_from, [0, number])  # what the first has made is no part of the way
        assert bars == shown


def loader(drawn_from: PairBatches, epoch: int = 0, rank: int = 0, device: str = "cpu"):
    data = TrainingData(drawn_from)
    data.trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank,
                                   strategy=SimpleNamespace(root_device=torch.device(device)))
    return data.train_dataloader()


def test_the_trainer_gets_the_micro_batches_of_its_epoch_and_process_packed():
    drawn_from = batches(3, 2, world_size=2)
    given = list(loader(drawn_from, epoch=1, rank=1))
    assert len(given) == 3
    for (packed, references, share, ahead), expected in zip(given, drawn_from.epoch(1, 1), strict=True):
        pairs = [PAIRS[index] for index in expected.indices]
        assert torch.equal(packed.tokens, pack_pairs(pairs).tokens) and share == expected.share and not ahead
        assert references.tolist() == [[0.0, 0.0]] * 2


def test_a_loader_leaves_the_random_numbers_of_dropout_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(batches(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_pinned_for_a_gpu_alone():
    assert loader(batches(3), device="cuda").pin_memory and not loader(batches(3)).pin_memory


def test_pairs_come_with_their_references_in_full_precision_and_texts_with_none():
    packed, references = collate([Pair([1], [2], [3], -0.1, -1e-9), Pair([4], [5], [6], -3.0, -4.0)])
    assert references.dtype == torch.float64 and references.tolist() == [[-0.1, -1e-9], [-3.0, -4.0]]
    assert packed.tokens.tolist() == pack_pairs([Pair([1], [2], [3], 0.0, 0.0), Pair([4], [5], [6], 0.0, 0.0)]).tokens.tolist()
    texts = [Text([1, 2, 3], [True] * 3), Text([4, 5], [False, True])]
    packed, references = collate(texts)
    assert references is None and packed.positions.tolist() == pack_texts(texts).positions.tolist()


@pytest.mark.parametrize(("accumulate", "world_size", "more"), [
    (1, 1, {}), (2, 1, {}), (3, 2, {}), (2, 3, {}), (8, 2, {}), (2, 2, {"batch_tokens": 12})])
def test_a_steps_first_micro_batches_have_all_of_it_ahead(accumulate, world_size, more):
    """With KTO: those of each process its own, each thumb once in all, and none in the others."""
    drawn_from = PairBatches(PAIRS, 0, 2, more.get("batch_tokens", 0), accumulate, 0, 0, world_size, with_kl=True)
    plain = PairBatches(PAIRS, 0, 2, more.get("batch_tokens", 0), accumulate, 0, 0, world_size)
    for epoch in (0, 1):
        seen = [list(drawn_from.epoch(epoch, rank)) for rank in range(world_size)]
        assert [[one._replace(ahead=()) for one in of_rank] for of_rank in seen] == [
            list(plain.epoch(epoch, rank)) for rank in range(world_size)]
        for at in range(len(seen[0])):
            if at % accumulate:
                assert not any(of_rank[at].ahead for of_rank in seen)
                continue
            step = [one for of_rank in seen for one in of_rank[at:at + accumulate]]
            ahead = [one for of_rank in seen for one in of_rank[at].ahead]
            assert [(one.indices, one.share, one.ahead) for one in ahead] == [(one.indices, one.share, ()) for one in step]
            assert len({len(of_rank[at].ahead) for of_rank in seen}) == 1  # processes keep in step
            counted = [index for one in ahead if one.share for index in one.indices]
            assert len(set(counted)) == len(counted) and sum(one.share * len(one.indices) for one in ahead) == pytest.approx(1)


def test_mismatched_answers_come_packed_with_their_references():
    thumbs = [Pair([number], [7], [], -1.0, 0.0, kl=[number, 9], kl_base_prob=-float(number)) for number in range(1, 5)]
    drawn_from = PairBatches(thumbs, 0, 2, 0, 2, 0, 0, 1, with_kl=True)
    (_, _, _, ahead), (_, _, _, after) = loader(drawn_from)
    assert len(ahead) == 2 and after == []
    for (packed, references, share), expected in zip(ahead, drawn_from.epoch(0, 0)[0].ahead, strict=True):
        of = [thumbs[index] for index in expected.indices]
        assert torch.equal(packed.tokens, pack_pairs([TokenPair(thumb.prompt, thumb.kl, []) for thumb in of]).tokens)
        assert references.tolist() == [thumb.kl_base_prob for thumb in of] and share == 1 / 4


@pytest.mark.parametrize(("size", "accumulate", "smallest"), [(1, 1, 1), (10, 1, 10), (3, 3, 1), (3, 4, 10), (4, 1, 2)])
def test_the_smallest_step(size, accumulate, smallest):
    assert PairBatches(PAIRS, 0, size, 0, accumulate, 0, 0, 1).smallest_step() == smallest
