"""Pairs with scores of their own: --min_gap leaves out those that differ by less; without it the scores have no effect."""

import json

import pytest

from src.data.faults import usable
from src.data.ranking import PairRule, rule_without_effect
from src.data.read import read_pairs
from src.errors import UserError

PAIR = {"prompt": "why?", "chosen": "so.", "rejected": "no."}


@pytest.fixture
def read(tmp_path):
    def make(*records: dict, min_gap: float = 0.0):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return read_pairs(path, True, PairRule("best_worst", min_gap))

    return make


@pytest.mark.parametrize(("chosen", "reject"), [
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"), ("chosen_avg_rating", "rejected_avg_rating"),
    ("Reward_Chosen", "reward_reject"),
])
def test_pairs_that_differ_by_less_are_left_out(read, chosen, reject):
    scores = (9, 5), (6, 5), ("7.5", "5"), (5, 9), (5, None), (None, None)
    records = [PAIR | {chosen: good, reject: bad} for good, bad in scores]
    reading = read(*records, min_gap=2.5)
    assert reading.numbers == [1, 3] and not reading.faults and reading.notes == []
    assert reading.facts == {"gaps": {"min_gap": 2.5, "below": 2, "without_score": 2}}
    assert reading.made == f"--min_gap 2.5 by {chosen} and {reject} leaves out 2 pairs below it and 2 without scores"
    assert rule_without_effect(reading, {"--pairs": None, "--min_gap": 2.5}) == []
    assert len(rule_without_effect(reading, {"--pairs": "all", "--min_gap": 2.5})) == 1
    everything = read(*records)
    assert everything.numbers == [1, 2, 3, 4, 5, 6] and everything.notes == [f"not used: columns {chosen}, {reject}"]
    assert everything.facts is None


def test_a_margin_is_the_difference(read):
    assert read(*(PAIR | {"margin": margin} for margin in (3, 1, 2, None)), min_gap=2).numbers == [1, 3]


def test_scores_of_one_side_are_none(read):
    reading = read(PAIR | {"score_chosen": 9}, min_gap=2)
    assert reading.rows and reading.facts is None and len(rule_without_effect(reading, {"--min_gap": 2.0})) == 1


def test_what_is_no_score_names_its_row_and_key(read):
    fault, = read(PAIR | {"margin": 3}, PAIR | {"margin": "wide"}, min_gap=2).faults
    assert (fault.row, fault.kind) == (2, "no score")
    assert "row 2: its margin is 'wide' where a number is expected" in fault.message


def test_a_file_of_smaller_gaps_is_refused_in_a_line(read):
    with pytest.raises(UserError, match="--min_gap 5 by margin leaves out 2 pairs below it .*no pair to learn from") as caught:
        usable(read(PAIR | {"margin": 3}, PAIR | {"margin": 1}, min_gap=5), skip_bad_rows=False)
    assert "\n" not in str(caught.value)
