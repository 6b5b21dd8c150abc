"""What numpy and pandas print of a value is read as that value; the texts here are theirs."""

import json
import math
import pprint

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.printed import parse
from src.data.read import read_pairs
from src.data.rows import Row

any_character = st.characters(exclude_categories=["Cs"])
texts = st.text(st.one_of(st.sampled_from("""'"\\\n\t{}[] ,()"""), any_character), max_size=40)
numbers = st.one_of(st.integers(-10**9, 10**9), st.booleans(), st.none(), st.just(math.inf), st.just(-math.inf))


def of_objects(values: list) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@given(st.lists(st.one_of(texts, numbers), max_size=9))
def test_lists_of_texts_and_numbers(values):
    array = of_objects(values)
    assert parse(str(array)) == parse(repr(array)) == parse(str(values)) == values
    assert parse(repr([array, array])) == [values, values]


@given(st.lists(texts, min_size=1, max_size=9))
def test_lists_of_texts(values):
    values = [text.rstrip("\0") for text in values]  # which arrays of fixed width do not keep
    array = np.array(values)
    assert parse(str(array)) == parse(repr(array)) == parse(str(list(array))) == values


@given(st.lists(st.lists(texts, max_size=4), min_size=1, max_size=4))
def test_lists_of_lists(values):
    assert parse(str(of_objects(values))) == values  # list([...])
    assert parse(str(of_objects(list(map(of_objects, values))))) == values  # array([...], dtype=object)
    if values[0]:
        assert parse(str(np.array([values[0], values[0]], dtype=object))) == [values[0], values[0]]  # of two dimensions


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@given(st.lists(st.floats(-1000, 1000, width=16), min_size=1, max_size=60))
def test_lists_of_numbers(dtype, values):
    array = np.array([*values, np.nan, np.inf, -np.inf], dtype)
    for text in (str(array), repr(array), str(list(array)), str(array.tolist())):
        assert parse(text) == pytest.approx(array.tolist(), nan_ok=True, rel=1e-3, abs=1e-6), text
    whole = np.array(values, np.int64)
    assert parse(str(whole)) == parse(repr(whole)) == parse(str(list(whole))) == whole.tolist()
    assert parse(str(whole > 0)) == parse(str(list(whole > 0))) == (whole > 0).tolist()


@given(st.lists(st.text("ab \n'", min_size=70, max_size=200), min_size=2, max_size=4))
def test_long_strings_as_pprint_wraps_them(values):
    of_messages = [{"role": "user", "content": value} for value in values]
    for value in (values, of_messages, of_messages[:1], {"a": values[0]}):
        assert parse(pprint.pformat(value)) == value


@pytest.mark.parametrize("text", [
    "[1 + 2]", "['a' + 'b']", "[a b]", "[np.float64(1, 2)]", "[os.system('x')]", "np.load('x')", "array()", "np",
    "[-'a']", "[-True]", "['a' for a in 'b']", "[1. 2.", "['a' 'b]", "[1 2]]",
    "1 2", "[{'a': 1}]\n[{'a': 2}]", "{nan: 1}", "np.True", "-None",
])
def test_nothing_else_is_read(text):
    assert parse(text) is None


def test_what_is_left_out_is_an_ellipsis():
    assert parse(str(np.arange(1001))) == [0, 1, 2, ..., 998, 999, 1000]
    assert parse(str(of_objects(["a b"] * 1001))) == ["a b"] * 3 + [...] + ["a b"] * 3
    assert parse(str(np.arange(1000))) == list(range(1000))


@pytest.mark.parametrize("scores", [[1.0, 2.0, None], [1, 2, 0], [0.25, 0.5, math.nan], [-1e-9, 1e20, -math.nan]])
@pytest.mark.parametrize("answers", [["a b", "so.", "c"], ["it's", 'the "so"', "d\ne"], ["a" * 70, "so. " * 30, "[]"]])
def test_lists_of_a_parquet_that_pandas_writes_as_a_csv(tmp_path, answers, scores):
    frame = pd.DataFrame({"prompt": ["why?"] * 2, "responses": [answers] * 2, "scores": [scores] * 2})
    frame.to_parquet(tmp_path / "a.parquet")
    pd.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "a.csv", index=False)
    rows = read_pairs(tmp_path / "a.csv", require_reject=True).rows
    worst = 2 if scores[2] == 0 else 0
    assert rows == read_pairs(tmp_path / "a.parquet", require_reject=True).rows
    assert rows == [Row("why?", answers[1], answers[worst])] * 2


def test_other_lists_of_a_parquet_that_pandas_writes_as_a_csv(tmp_path):
    records = [
        {"prompt": "why?", "history": history, "completions": [{"response": "so.", "overall_score": 2.0},
         {"response": "no.", "overall_score": 1.0}, {"response": "hm.", "overall_score": None}]}
        for history in ([["hi", "ho"]], [])]
    pd.DataFrame(records).to_parquet(tmp_path / "a.parquet")
    pd.read_parquet(tmp_path / "a.parquet").to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(records).to_csv(tmp_path / "b.csv", index=False)
    (tmp_path / "b.csv").write_text((tmp_path / "b.csv").read_text().replace("None", "nan"))
    for name in ("a.parquet", "a.csv", "b.csv"):
        reading = read_pairs(tmp_path / name, require_reject=True)
        assert reading.rows == [Row("Human: hi\n\nAssistant: ho\n\nHuman: why?", "so.", "no."), Row("why?", "so.", "no.")], name
        assert not reading.notes and not reading.faults


@pytest.mark.parametrize(("record", "words"), [
    ({"scores": str(np.arange(1001))}, "its scores is cut: numpy wrote ... for entries that it left out; write the file"),
    ({"responses": str(of_objects(["a"] * 1001))}, "its responses is cut: numpy wrote ..."),
    ({"responses": "['a' 'b"}, "its responses begins like a list, but can't be read as one; write it as JSON"),
    ({"scores": "[1 2 x]"}, "its scores begins like a list, but can't be read"), ({"scores": "[]"}, "is not a list with entries"),
    ({"scores": "[1. inf]"}, "entry 2 of its scores is inf where a number is expected"),
])
def test_lists_that_can_t_be_read_name_their_row_and_key(tmp_path, record, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "why?", "responses": "['a' 'b']", "scores": "[1. 2.]"} | record))
    fault, = read_pairs(path, require_reject=True).faults
    assert fault.message.startswith(f"{path}: row 1: ") and words in fault.message
