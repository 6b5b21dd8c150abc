"""Templates: the exact strings, and no blank line where a text should go on."""

import re
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data.conversation import clean
from src.data.templates import CLASSIC, draw_form
from tests.classic import NAMES, format_answer, format_prompt

texts = st.text(st.one_of(st.sampled_from(" \t\r\n\x0b\u00a0\u2028ab"), st.characters()), max_size=40)


def test_the_three_templates():
    assert NAMES == ("user", "question", "input")
    assert [format_prompt(index, " Why?\r\n\r\nSay. ") for index in range(3)] == [
        "User: Why?\nSay.\n\nAssistant:", "Question: Why?\nSay.\n\nAnswer:", "Input: Why?\nSay.\n\nResponse:"]
    assert format_answer("\n\nSo.\n \nYes. ") == " So.\nYes.\n\n"


@pytest.mark.parametrize("text, cleaned", [
    ("a\r\nb", "a\nb"), ("a\rb", "a\nb"), ("a\n\n\n\nb", "a\nb"), ("a\n \t \n  b", "a\n  b"), ("a  \n\nb", "a  \nb"),
    ("a\r\r\nb", "a\nb"), ("a b", "a b"), ("  ", ""), ("", ""), ("a\n\nb\n\nc", "a\nb\nc"),
])
def test_clean_by_hand(text, cleaned):
    assert clean(text) == cleaned


@given(texts)
def test_clean_leaves_no_blank_line_and_loses_no_other_character(text):
    cleaned = clean(text)
    assert "\r" not in cleaned and cleaned == cleaned.strip() == clean(cleaned)
    assert all(line.strip() for line in cleaned.split("\n")) or cleaned == ""
    assert re.sub(r"\s", "", cleaned) == re.sub(r"\s", "", text)


@given(texts)
def test_a_turn_ends_only_where_the_template_ends_it(text):
    assert format_answer(text).find("\n\n") == len(format_answer(text)) - 2
    assert format_prompt(0, text).count("\n\n") == 1


@pytest.mark.parametrize("generator", [np.random.default_rng(3), Random(3)])
def test_templates_are_drawn_80_10_10(generator):
    n = 20_000
    counts = np.bincount([draw_form(CLASSIC, generator) for _ in range(n)], minlength=3)
    # Five standard deviations of a binomial count; the seed is fixed, so this never flickers.
    for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert abs(count - share * n) < 5 * (n * share * (1 - share)) ** 0.5
    assert counts.sum() == n
