"""Numbers as people write them, against what Python's own readers take."""

import math

import pytest

from src.numbers import read_number


@pytest.mark.parametrize(("text", "number"), [
    ("0", 0.0), ("-0", 0.0), ("0e5", 0.0), (".0", 0.0), ("1.", 1.0), (".5e-3", 5e-4), ("+7", 7.0), ("1E3", 1000.0),
    ("5e-324", 5e-324),
    ("1e400", math.inf), ("-1e400", -math.inf)])
def test_what_is_a_number(text, number):
    assert read_number(text) == number and not str(read_number(text)).startswith("-0.0")


@pytest.mark.parametrize("text", ["", " 1", "1 ", "1_0", "0_0", "٣", "１", "nan", "inf", "0x1", "e5", ".", "1e", "--1"])
def test_what_is_none(text):
    assert read_number(text) is None


@pytest.mark.parametrize("text", ["1e-400", "-1e-400", "0.1e-9999", "1e-324"])
def test_what_would_vanish(text):
    assert float(text) == 0 and read_number(text) is None
