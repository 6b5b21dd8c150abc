"""Settings: built of what the parser gives, and of nothing else."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from src.settings import NEEDED, RESOLVED, Flag, build, defaults, flag, flags_of, flat, free_on_resume, group, input_files, table
from src.values import input_file, positive, zero_or_one


@dataclass(frozen=True, kw_only=True)
class Inner:
    steps: int = flag(positive, 3, "how many")
    limit: int = flag(positive, RESOLVED, "the longest")
    made: str = "plain"


@dataclass(frozen=True, kw_only=True)
class Outer:
    model: str = flag(input_file, NEEDED, "to read", free=True)
    inner: Inner = group("inner")
    numbers: dict = table({"beta": Flag(positive, 2, "a number"), "on": Flag(zero_or_one, True, "a switch")})


VALUES = {"model": "m.pth", "steps": 5, "limit": 9, "made": "so", "beta": 7, "on": False}


def test_what_is_built_gives_the_values_back():
    made = build(Outer, VALUES)
    assert (made.model, made.inner.steps, made.inner.limit, made.inner.made, dict(made.numbers)) == (
        "m.pth", 5, 9, "so", {"beta": 7, "on": False})
    assert flat(made) == VALUES
    with pytest.raises(FrozenInstanceError):
        made.inner.steps = 1
    with pytest.raises(TypeError):
        made.numbers["beta"] = 1


def test_an_unknown_name_and_a_missing_value_are_errors():
    with pytest.raises(TypeError, match="Outer has no bta, stepz"):
        build(Outer, VALUES | {"stepz": 1, "bta": 2})
    for name in ("model", "limit"):
        with pytest.raises(TypeError, match=name):
            build(Outer, {key: value for key, value in VALUES.items() if key != name})
    assert build(Outer, {"model": "m", "limit": 1}).inner.steps == 3


def test_flags_in_order_with_their_groups_and_defaults():
    assert [(name, title) for name, _, title in flags_of(Outer)] == [
        ("model", None), ("steps", "inner"), ("limit", "inner"), ("beta", None), ("on", None)]
    assert defaults(Outer) == {"steps": 3, "beta": 2, "on": True}
    assert free_on_resume(Outer) == {"model"}
    assert [one.shown_default for _, one, _ in flags_of(Outer)] == [None, 3, None, 2, "1"]


def test_files_that_are_read(tmp_path):
    (tmp_path / "m.pth").touch()
    assert input_files(build(Outer, VALUES | {"model": str(tmp_path / "m")})) == [("--model", tmp_path / "m.pth")]
