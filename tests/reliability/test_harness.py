"""The harness finds faults that are put in: what it would be worth nothing without."""

import ctypes
import time
from errno import EIO
from functools import partial
from pathlib import Path

import pytest

from src.errors import UserError
from tests.reliability.fuzz import Reader, fuzz, in_words
from tests.reliability.kills import FAIL, KILL_AFTER, SIGNAL, TEAR, Point, at_point, unbroken
from tests.reliability.mutate import blind, json_value
from tests.reliability.sweep import try_value


def call_number(reference, kind: str, name: str) -> int:
    return next(number for number, call in enumerate(reference.calls, start=1) if call[0] == kind and call[1].endswith(name))


@pytest.mark.slow
def test_a_file_that_is_written_in_place_is_found(run, jobs, workplace):
    job = jobs["merge"]
    reference = unbroken(partial(run, sabotage="in place"), job, workplace)
    found = at_point(run, job, reference, Point(call_number(reference, "write", "o.pth") + 1, KILL_AFTER), sabotage="in place")
    assert any("o.pth is neither whole nor as it was" in line for line in found), found


@pytest.mark.slow
def test_a_torn_row_that_counts_as_finished_is_found(run, jobs, references):
    reference = references["rlhf_generate_reject_csv"]
    rows = [number for number, (kind, path) in enumerate(reference.calls, start=1) if kind == "write" and path.endswith("o.csv")]
    found = at_point(run, jobs["rlhf_generate_reject_csv"], reference, Point(rows[-1], TEAR), sabotage="torn rows")
    assert found


def test_a_refused_write_that_is_not_told_is_found(run, jobs, references):
    reference = references["rlhf_generate_reject_csv"]
    rows = [number for number, (kind, path) in enumerate(reference.calls, start=1) if kind == "write" and path.endswith("o.csv")]
    found = at_point(run, jobs["rlhf_generate_reject_csv"], reference, Point(rows[-1], FAIL, EIO), sabotage="refused writes")
    assert found and "says that all went well" in found[0], found


@pytest.mark.slow
def test_a_signal_that_is_swallowed_is_found(run, jobs, references):
    found = at_point(run, jobs["evaluate"], references["evaluate"], Point(3, SIGNAL, 15), sabotage="deaf")
    assert found and "status 0" in found[0], found


def test_a_flag_that_is_not_checked_is_found(run, jobs, workplace):
    folder = workplace / "nowhere"
    folder.mkdir()
    job = jobs["rlhf_generate_reject_csv"]
    assert not try_value(run, job, "--seed", "-1", folder)
    found = try_value(partial(run, sabotage="seeds"), job, "--seed", "-1", folder)
    assert found and "status 1" in found[0], found


def refuse(path: Path) -> None:
    raise UserError(f"{path}: is damaged")


def crash(path: Path) -> None:
    ctypes.string_at(0)


def wait(path: Path) -> None:
    while True:
        time.process_time()


def fill_memory(path: Path) -> None:
    bytearray(4 << 30)


def touch(path: Path) -> None:
    path.with_name("more").write_text("here")
    refuse(path)


def mistake(path: Path) -> None:
    {}[path.read_bytes()[:1]]


def no_name(path: Path) -> None:
    raise UserError("the file is damaged")


def invalid(path: Path) -> None:
    raise AssertionError("rank is nan")


@pytest.mark.parametrize(("read", "words"), [
    (refuse, None), (crash, "status -11"), (wait, "takes over"), (fill_memory, "MemoryError"), (touch, "'more'"),
    (mistake, "KeyError from"), (no_name, "names no file"), (invalid, "rank is nan"),
])
def test_a_reader_with_a_fault_is_found(tmp_path, monkeypatch, read, words):
    monkeypatch.setattr("tests.reliability.fuzz.SLOWEST", 0.3)
    found = fuzz(Reader("x.json", [b'{"a": [1, 2]}'], read, (json_value, blind)), range(2), tmp_path)
    assert [finding.number for finding in found] == ([] if words is None else [0, 1])
    assert words is None or words in in_words(found)
