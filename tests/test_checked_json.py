"""JSON from anybody: limits, and shapes told by the first place that does not fit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.checked_json import DEEPEST, BadJson, Texts, parse_json

VALUES = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**63) | st.floats(allow_nan=False, allow_infinity=False)
                      | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
ROW = {"layer": str, "rank": int, "alpha": float, "parts?": [str]}


@given(VALUES)
def test_what_json_writes_is_read_back(value):
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(("text", "words"), [
    ("{", "not JSON"), ("", "not JSON"), (b"\xff\xff", "not JSON"), ("NaN", "NaN"), ("[-Infinity]", "-Infinity"),
    ("1e400", "1e400"), ("-1E+0400", "beyond"), ("[1.5, 1e0999]", "beyond"), ("9" * 310 + ".5", "beyond"),
    ("1e-400", "1e-400"), ("[-0.5e-0999]", "beyond"), ("0." + "0" * 400 + "1", "beyond"),
    ("9" * 400, "400 digits"), ("-" + "9" * 5000, "5000 digits"), ("18446744073709551616", "20 digits"),
    ("[" * 100_000 + "]" * 100_000, "nested"), ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "nested"),
    ('{"a":' * 70 + "1" + "}" * 70, "nested"),
])
def test_limits(text, words):
    with pytest.raises(BadJson, match=words):
        parse_json(text)


def test_just_within_the_limits():
    assert parse_json("[0e-400, -0.0E-999, 1e-300]") == [0, 0, 1e-300]
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)
    assert parse_json(str(2**64 - 1)) == 2**64 - 1 and parse_json("-9223372036854775808") == -2**63


@pytest.mark.parametrize(("text", "shape", "words"), [
    ("[]", {}, "it is a list where an object is expected"), ("{}", [object], "it is an object where a list is expected"),
    ("{}", {"layer": str}, "it lacks layer"), ('{"rows": [{}]}', {"rows": [ROW]}, r"rows\[0\] lacks layer"),
    ('[{"layer": 3, "rank": 1, "alpha": 1}]', [ROW], r"\[0\]\.layer is a whole number where text is expected"),
    ('[{"layer": "3", "rank": 1.5, "alpha": 1}]', [ROW], r"rank is a number where a whole number is expected"),
    ('[{"layer": "3", "rank": true, "alpha": 1}]', [ROW], r"rank is true or false where a whole number is expected"),
    ('[{"layer": "3", "rank": 1, "alpha": null}]', [ROW], r"alpha is null where a number is expected"),
    ('[{"layer": "3", "rank": 1, "alpha": 1, "parts": "x"}]', [ROW], r"parts is text where a list is expected"),
    ('[{"layer": "3", "rank": 1, "alpha": 1, "parts": [1]}]', [ROW], r"\[0\]\.parts\[0\] is a whole number where text"),
    ('{"a": 1}', {str: (str, None)}, "a is a whole number where text or null is expected"),
    ("1", bool, "it is a whole number where true or false is expected"),
    ('{"a": 3}', {"a": Texts(9)}, "a is a whole number where a list is expected"),
    ('{"a": ["b", 3]}', {"a": Texts(9)}, r"a\[1\] is a whole number where text is expected"),
    ('{"a": ["\u00e9", "\u00e9b"]}', {"a": Texts(4)}, "a holds texts of 5 bytes, of at most 4"),
])
def test_shapes(text, shape, words):
    with pytest.raises(BadJson, match=words):
        parse_json(text, shape)


@pytest.mark.parametrize(("text", "shape"), [
    ('[{"layer": "3", "rank": 1, "alpha": 1, "more": [{}]}]', [ROW]), ("3", float),
    ("null", (None, int)), ('{"b": null}', {str: object}),
    ('["\u00e9", "bc"]', Texts(4)), ("[]", Texts(0)), ("null", (None, Texts(1))),
    ('{"step": 1}', {"step": (int, None), "tokenizer?": str}),
])
def test_what_fits(text, shape):
    assert parse_json(text, shape) == json.loads(text)


def test_a_long_name_is_cut_in_the_message():
    with pytest.raises(BadJson) as caught:
        parse_json(json.dumps({"k" * 100_000: {"n" * 100_000: "x"}}), {str: {str: int}})
    assert len(str(caught.value)) < 200


def test_brackets_in_texts_are_no_depth():
    assert parse_json(json.dumps(["[{" * 1000])) == ["[{" * 1000]
