"""Lists of scored or ranked answers, as the field's data sets have them, and the pairs that each rule makes of them."""

import json
from itertools import permutations
from pathlib import Path

import pandas as pd
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.faults import usable
from src.data.ranking import RULES, PairRule, make_pairs
from src.data.read import read_pairs
from src.data.rows import Row
from src.data.tokenize import tokenize_pairs
from src.errors import UserError
from src.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("storage")


@pytest.fixture
def read(tmp_path):
    """`read(record, ..., rule=("all", 2.0))` -> the reading of a JSONL of these records."""

    def make(*records: dict, rule: tuple = (), require_reject: bool = True):
        path = tmp_path / "lists.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        return read_pairs(path, require_reject, PairRule(*rule))

    return make


def message(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def rated(text: str, *ratings: object, **more: object) -> dict:
    """UltraFeedback's: a rating of each aspect."""
    aspects = ("helpfulness", "honesty", "truthfulness")
    return {"response": text, "annotations": {aspect: {"Rating": rating, "Rationale": "Because."}
                                              for aspect, rating in zip(aspects, ratings, strict=False)}} | more


@pytest.mark.parametrize("record", [
    # Objects with a score, or several kinds of it.
    {"completions": [{"response": "C", "overall_score": 1.0}, {"response": "A", "overall_score": 8}, {"response": "B",
     "overall_score": "4.5"}]},
    {"completions": [{"response": "C", "fine-grained_score": 1.5, "overall_score": 10}, {"response": "A", "fine-grained_score": 5,
     "overall_score": 8}, {"response": "B", "fine-grained_score": 3, "overall_score": 5}]},
    {"completions": [rated("C", "1", "2", "N/A", overall_score=10), rated("A", "5", "4", "5", overall_score=8),
                     rated("B", "3", "3", "3", overall_score=5)]},
    {"completions": [rated("C", "1", "2"), rated("A", "5"), rated("B", "3", "3")]},
    {"responses": [{"text": "C", "score": 1}, {"text": "A", "score": 3}, {"text": "B", "score": 2}]},
    {"answers": [{"text": "C", "pm_score": -1}, {"text": "A", "pm_score": 3}, {"text": "B", "pm_score": 2}]},
    {"responses": [{"content": "C", "rating": 1}, {"content": "A", "rating": 3}, {"content": "B", "rating": 2}]},
    {"completions": [{"completion": message("C"), "reward": 0.1}, {"completion": message("A"), "reward": 0.9},
                     {"completion": message("B"), "reward": 0.5}]},
    {"completions": {"response": ["C", "A", "B"], "overall_score": [1.0, 8, 4.5], "model": ["x", "y", "z"]}},
    {"completions": "{'response': array(['C', 'A', 'B'], dtype=object), 'overall_score': array([1. , 8. , 4.5])}"},
    # Ranks, of which 1 is the best.
    {"answers": [{"answer": "C", "rank": 3.0, "model": "x"}, {"answer": "A", "rank": 1.0}, {"answer": "B", "rank": 2.0}]},
    {"responses": [{"response": "C", "rank": 3}, {"response": "A", "rank": 1}, {"response": "B", "rank": 2}]},
    {"responses": ["C", "A", "B"], "ranks": [3, 1, 2]}, {"completions": ["C", "A", "B"], "rank": [3, 1, 2]},
    # Scores beside the answers.
    {"responses": ["C", "A", "B"], "scores": [0.1, 0.9, 0.5]}, {"completions": ["C", "A", "B"], "scores": [1, 3, 2]},
    {"generations": ["C", "A", "B"], "ratings": [1.0, 5.0, 3.0]}, {"generations": ["C", "A", "B"], "rating": [1.0, 5.0, 3.0]},
    {"candidates": [message("C"), message("A"), message("B")], "scores": ["1", "3", "2"]},
    {"outputs": ["C", "A", "B"], "rewards": [-1, 1, 0]},
    # As a CSV holds them.
    {"responses": '["C", "A", "B"]', "scores": "[1, 3, 2]"}, {"responses": "['C', 'A', 'B']", "scores": "[1, 3, 2]"},
    {"answers": "[{'answer': 'C', 'rank': 3}, {'answer': 'A', 'rank': 1}, {'answer': 'B', 'rank': 2}]"},
])
def test_lists_in_every_form(read, record):
    for prompt in ({"prompt": "why?"}, {"instruction": "why?"}, {"prompt": [{"role": "user", "content": "why?"}]}):
        for rule, pairs in (("best_worst", ["AC"]), ("all", ["AB", "AC", "BC"]), ("adjacent", ["AB", "BC"])):
            reading = read(prompt | record, rule=(rule,))
            assert not reading.faults, reading.faults
            assert reading.rows == [Row("why?", *pair) for pair in pairs]
            assert reading.numbers == [1] * len(pairs) and reading.notes == []


@pytest.mark.parametrize(("record", "pair"), [
    ({"context": [{"role": "user", "content": "why?"}], "response1": "A", "response2": "B", "overall_preference": -2}, "AB"),
    ({"prompt": "why?", "response_1": "A", "response_2": "B", "preference_strength": 1}, "BA"),
    ({"prompt": "why?", "response_0": "A", "response_1": "B", "better_response_id": 0, "is_response_0_safe": True}, "AB"),
    ({"prompt": "why?", "response_0": "A", "response_1": "B", "better_response_id": 1}, "BA"),
    ({"question": "why?", "answer_0": "A", "answer_1": "B", "score_0": -0.5, "score_1": 0.5}, "BA"),
    ({"prompt": "why?", "response_a": "A", "response_b": "B", "score_a": 7, "score_b": 6}, "AB"),
    ({"history": "why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}, "AB"),
    ({"history": "why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 0}, "BA"),
    ({"history": "why?", "human_ref_A": "A", "human_ref_B": "B", "score_A": 5, "score_B": 21}, "BA"),
    ({"prompt": "why?", "output": ["A", "B"]}, "AB"), ({"prompt": "why?", "output": "['B' 'A']"}, "BA"),
    ({"prompt": "why?", "output": '["B", "A"]'}, "BA"),
    ({"prompt": "why?", "Response_A": "A", "Response_B": "B", "rating_A": "7", "rating_B": "6"}, "AB"),
])
def test_two_answers_and_which_is_better(read, record, pair):
    for rule in RULES:
        reading = read(record, rule=(rule,))
        assert reading.rows == [Row("why?", *pair)] and not reading.faults


def test_a_prompt_of_several_turns_and_whole_conversations(read):
    nectar = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: why?\n\nAssistant: "
    reading = read({"prompt": nectar, "answers": [{"answer": "no.", "rank": 2}, {"answer": "so.", "rank": 1}]})
    assert reading.rows == [Row(nectar, "so.", "no.")]
    user = {"role": "user", "content": "why?"}
    whole = {"responses": [[user, *message("no.")], [user, *message("so.")]], "scores": [0, 1]}
    assert read(whole, whole).rows == [Row("why?", "so.", "no.")] * 2
    reading = read({"prompt": "why?", "system": "Be brief.", "responses": ["no.", "so."], "scores": [0, 1]})
    assert reading.rows == [Row("System: Be brief.\n\nHuman: why?", "so.", "no.")]


def stated(scores: list, rule: str, gap: float) -> set[tuple[int, int]]:
    """The rules as docs/data.md states them, on whole numbers."""
    known = [(score, -at) for at, score in enumerate(scores) if score is not None]
    order = [-at for _, at in sorted(known, reverse=True)]
    if rule == "best_worst" and known:
        pairs = {(order[0], next(at for at, score in enumerate(scores) if score == min(known)[0]))}
    elif rule == "all":
        pairs = set(permutations(order, 2))
    else:
        pairs = set(zip(order, order[1:], strict=False))
    return {(one, other) for one, other in pairs if scores[one] > scores[other] and scores[one] - scores[other] >= gap}


@given(scores=st.lists(st.one_of(st.integers(-3, 3), st.none()), max_size=6), rule=st.sampled_from(RULES),
       gap=st.sampled_from([0, 1, 2, 4]))
def test_pairs_by_the_stated_rule(scores, rule, gap):
    pairs = make_pairs(scores, PairRule(rule, float(gap)))
    assert len(pairs) == len(set(pairs)) and set(pairs) == stated(scores, rule, gap)
    assert pairs == sorted(pairs, key=lambda pair: (-scores[pair[0]], pair[0]))  # better answers first


@pytest.mark.parametrize(("completions", "pair"), [
    # The first kind of score that two answers have; another kind is never compared with it.
    ([{"response": "A", "fine-grained_score": 5, "overall_score": 3}, {"response": "B", "overall_score": 4},
      {"response": "C", "overall_score": 1}], "BC"),
    ([{"response": "A", "fine-grained_score": 5, "overall_score": 3}, {"response": "B", "fine-grained_score": 1,
     "overall_score": 10}, {"response": "C", "overall_score": 1}], "AB"),
    ([{"response": "A", "score": 5}, {"response": "B", "rating": 4}], ""),
    ([{"response": "A", "score": 5, "rank": 2}, {"response": "B", "score": 4, "rank": 1}], "AB"),
])
def test_kinds_of_scores_are_not_mixed(read, completions, pair):
    reading = read({"prompt": "why?", "completions": completions})
    assert reading.rows == ([Row("why?", *pair)] if pair else []) and not reading.faults
    assert reading.facts["lists"]["answers_without_score"] == len(completions) - (3 if pair == "BC" else 2 if pair else 1)


def test_rounding_makes_neither_a_gap_nor_a_tie():
    assert make_pairs([0.1 + 0.2, 0.3], PairRule("all")) == []
    assert make_pairs([4.3, 4.0], PairRule("all", 0.3)) == [(0, 1)]  # 4.3 - 4.0 is a little less than 0.3
    assert make_pairs([4.3, 4.0], PairRule("all", 0.31)) == []


def test_counts_are_reported(read):
    lists = [{"prompt": "why?", "responses": ["a", "b", "c"], "scores": scores} for scores in (
        [1, 2, 3], [2, 2, 2], [None, 2, None], [1, 1.5, "N/A"])]
    reading = read(*lists, rule=("all", 1.0))
    assert reading.numbers == [1, 1, 1]
    assert reading.facts == {"lists": {
        "rule": "all", "min_gap": 1.0, "count": 4, "pairs": 3, "answers_without_score": 3,
        "without_pair": {"all scores equal": 1, "fewer than two scores": 1, "no gap of --min_gap 1": 1}}}
    assert reading.made == ("4 lists of answers make 3 pairs (all, gaps from 1); 3 of them make none (all scores equal: 1, fewer "
                            "than two scores: 1, no gap of --min_gap 1: 1); 3 answers without a score")
    assert read(lists[0]).made == "1 list of answers makes 1 pair (best_worst)"


def test_a_failed_answer_without_a_score_is_in_no_pair(read):
    objects = [{"response": "no.", "score": 1}, None, {"response": "so.", "score": 2}]
    for record in ({"generations": ["no.", None, "so."], "ratings": [1, None, 2]}, {"completions": objects}):
        reading = read({"prompt": "why?"} | record, rule=("all",))
        assert reading.rows == [Row("why?", "so.", "no.")] and not reading.faults
        assert reading.facts["lists"]["answers_without_score"] == 1


GOOD = {"prompt": "why?", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(("record", "kind", "words"), [
    ({"responses": None}, "no list of answers", "its responses is not a list with entries"),
    ({"responses": []}, "no list of answers", "its responses is not a list"),
    ({"responses": "a"}, "no list of answers", "its responses is not a list"),
    ({"responses": {"a": "b"}}, "no list of answers", "its responses is not a list"),
    ({"scores": None}, "no list of answers", "its scores is not a list"), ({"scores": 5}, "no list of answers", "its scores is"),
    ({"scores": [1]}, "unequal lists", "its responses has 2 entries and its scores 1"),
    ({"scores": [1, "good"]}, "no score", "entry 2 of its scores is 'good' where a number is expected"),
    ({"scores": [1, [2]]}, "no score", "entry 2 of its scores is [2]"), ({"scores": [1, "1e999"]}, "no score", "entry 2"),
    ({"scores": [1, 10 ** 400]}, "no score", "entry 2 of its scores"),
    ({"responses": ["a", " "]}, "empty answer", "answer 2 of its responses is empty"),
    ({"responses": ["a", 5]}, "no text", "answer 2 of its responses is of type int"),
    ({"responses": ["a", "b\0"]}, "NUL character", "answer 2 of its responses holds a NUL"),
    ({"responses": ["a", [{"role": "tool", "content": "x"}]]}, "unsupported role", "answer 2 of its responses, message 1,"),
    ({"prompt": ""}, "empty prompt", "has an empty prompt"),
])
def test_what_is_no_list_names_its_row_and_key(read, record, kind, words):
    reading = read(GOOD, GOOD | record, GOOD)
    fault, = reading.faults
    assert (fault.row, fault.kind) == (2, kind) and words in fault.message, fault
    assert fault.message.startswith(f"{reading.path}: row 2")
    assert reading.numbers == [1, 3] and reading.facts["lists"]["count"] == 2


@pytest.mark.parametrize(("item", "words"), [
    ("text", "answer 2 of its answers is of type str where an object"), ({"rank": 2}, "answer 2 of its answers is empty"),
    ({"answer": "b", "rank": "second"}, "answer 2 of its answers: its rank is 'second'"),
])
def test_an_object_without_its_parts_is_named(read, item, words):
    reading = read({"prompt": "why?", "answers": [{"answer": "a", "rank": 1}, item]})
    assert words in reading.faults[0].message, reading.faults


@pytest.mark.parametrize(("record", "words"), [
    ({"labels": 2}, "its labels is 2 where 0 or 1 is expected"),
    ({"labels": "A"}, "its labels is 'A' where a number is expected"),
])
def test_a_label_that_names_no_answer_is_a_fault(read, record, words):
    good = {"history": "why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}
    reading = read(good, good | record)
    assert [fault.row for fault in reading.faults] == [2] and words in reading.faults[0].message


def test_an_ordered_list_has_two_answers(read):
    good = [{"prompt": "why?", "output": ["A", "B"]}] * 100  # as many as show the form
    reading = read(*good, {"prompt": "why?", "output": ["A", "B", "C"]}, {"prompt": "why?", "output": ["A", ""]})
    assert [fault.row for fault in reading.faults] == [101, 102] and len(reading.rows) == 100
    assert "its output has 3 entries where two answers are expected, the better one first" in reading.faults[0].message
    assert "answer 2 of its output is empty" in reading.faults[1].message
    # Beside a thumb a list is an answer's text.
    assert read({"prompt": "why?", "output": '["A", "B"]', "label": 1}).rows == [Row("why?", '["A", "B"]', "")]


def test_labels_beside_other_answers_name_none(read):
    with pytest.raises(UserError, match="lacks chosen"):
        read({"prompt": "why?", "response_a": "A", "response_b": "B", "labels": 1})


def test_pairs_beside_lists_are_the_preferences(read):
    reading = read(GOOD | {"chosen": "so.", "rejected": "no."})
    assert reading.rows == [Row("why?", "so.", "no.")] and reading.notes == ["not used: columns responses, scores"]


@pytest.mark.parametrize(("record", "words"), [
    (GOOD | {"answers": ["x", "y"]}, "both responses and answers"), (GOOD | {"ratings": [1, 2]}, "both scores and ratings"),
    ({"prompt": "why?", "completions": ["a", "b"], "labels": [True, False]}, "lacks chosen"),  # TRL's stepwise supervision
])
def test_what_is_unclear_is_refused(read, record, words):
    with pytest.raises(UserError, match=words):
        read(record)


def test_a_file_whose_lists_make_no_pair_is_refused_in_a_line(read):
    reading = read(GOOD | {"scores": [1, 1]})
    with pytest.raises(UserError, match="1 list of answers makes 0 pairs .*all scores equal: 1.*no pair to learn") as caught:
        usable(reading, skip_bad_rows=False)
    assert "\n" not in str(caught.value)


def test_where_no_answer_has_a_score_its_names_are_told(read):
    other = {"prompt": "why?", "completions": [{"response": "a", "quality": 1}, {"response": "b", "quality": 2}]}
    names = "2 answers without a score, which is read from fine-grained_score, .*, overall_score, .*, rank, ranking"
    with pytest.raises(UserError, match=f"{names}, so there is no pair to learn from"):
        usable(read(other), skip_bad_rows=False)
    scored = {"prompt": "why?", "completions": [{"response": "a", "score": 1}, {"response": "b"}]}
    assert read(other, scored).made.endswith("; 3 answers without a score")
    assert read(GOOD | {"scores": [None, None]}).made.endswith("; 2 answers without a score")


def test_where_rejects_are_written_lists_are_refused(read):
    with pytest.raises(UserError, match="holds lists of scored answers, which need no rejected answers"):
        read(GOOD, require_reject=False)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "parquet", "csv", "json"])
def test_in_other_files(tmp_path, ending):
    records = [GOOD, GOOD | {"scores": [3, 1]}]
    path = tmp_path / f"lists.{ending}"
    frame = pd.DataFrame(records)
    if ending == "parquet":
        frame.to_parquet(path)
    elif ending == "csv":
        frame.to_csv(path, index=False)
    else:
        write(path, records)
    assert read_pairs(path, True).rows == [Row("why?", "b", "a"), Row("why?", "a", "b")]


def write(path: Path, records: list[dict]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        with pyarrow.output_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]) as stream:
            stream.write("\n".join(map(json.dumps, records)).encode())


def test_pairs_of_a_list_share_their_prompt_s_tokens(read):
    """Under one template, though one is drawn for each other row."""
    several = {"prompt": "why?", "responses": ["a", "b", "c", "d"], "scores": [1, 2, 3, 4]}
    reading = read(*[several] * 40, rule=("all",))
    pairs, _ = tokenize_pairs(reading.rows, load_tokenizer("bytes"), None, 100, 0, reading.numbers)
    prompts = [bytes(pair[0]) for pair in pairs]
    assert len(prompts) == 240 and len(set(prompts)) == 3
    for start in range(0, 240, 6):
        assert len(set(prompts[start:start + 6])) == 1


def test_a_single_list_draws_its_template_too(read):
    reading = read(GOOD | {"responses": ["a", "b", "c"], "scores": [1, 2, 3]}, rule=("all",))
    rows, numbers = reading.rows, reading.numbers
    bytes_ = load_tokenizer("bytes")
    assert len({bytes(tokenize_pairs(rows, bytes_, None, 100, seed, numbers)[0][0][0]) for seed in range(30)}) == 3
    rounds = [bytes(pair[0]) for pair in tokenize_pairs(rows, bytes_, 90, 100, 0, numbers)[0]]
    assert all(len(set(rounds[start:start + 3])) == 1 for start in range(0, 90, 3)) and len(set(rounds)) == 3
