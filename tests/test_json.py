"""JSON as its readers in other languages know it, which have no NaN and no infinity."""

import json
import math
from pathlib import Path

import pytest

from src.errors import NotFinite
from src.files import json_text
from src.preference.entries import Pair
from src.preference.pairs import save_pairs
from src.run_files import append_line
from tests.stored_pairs import stored


@pytest.mark.parametrize(("values", "named"), [
    ({"a": 1.5, "loss": math.nan}, "loss"), ({"a": [{"b": 1}, {"b": -math.inf, "c": math.nan}]}, "a[1].b"),
    ((0.0, math.inf), "[1]"), (math.nan, "its value"),
])
def test_a_number_that_is_not_finite_is_named_with_its_file(values, named):
    with pytest.raises(NotFinite) as caught:
        json_text(values, "out/x.json")
    assert str(caught.value) == f"out/x.json: not written, since {named} is not a finite number"


def test_the_rest_is_what_the_library_writes():
    values = {"a": [1, 1.5, 1e308, None, True, "NaN", "ä"], "b": {}}
    assert json_text(values, "x", indent=2, ensure_ascii=False) == json.dumps(values, indent=2, ensure_ascii=False)


def test_files_that_have_it_already_stay(tmp_path: Path):
    append_line(tmp_path / "m.jsonl", {"step": 1})
    save_pairs(tmp_path / "p.save", stored([Pair([1], [2], [3], -1.0, -2.0)]), {"seed": 0})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(NotFinite, match="m.jsonl: not written, since loss"):
        append_line(tmp_path / "m.jsonl", {"step": 2, "loss": math.inf})
    with pytest.raises(NotFinite, match="p.save.json: not written, since rate"):
        save_pairs(tmp_path / "p.save", stored([]), {"rate": math.nan})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
