"""Rows and tokens in files are the same as in memory; the files have no names, and what is wrong with them is told."""

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.data import spill
from src.data.batching import batches_by_tokens, batches_from
from src.data.examples import read_texts
from src.data.faults import BadRow
from src.data.packing import Text
from src.data.quotes import without_outer_spaces
from src.data.read import read_pairs
from src.data.rows import Row
from src.data.spill import Spill, Storage
from src.data.tokenize import tokenize_pairs
from src.errors import UserError
from src.tokenizer.byte import ByteTokenizer

ITEMS = [Row("a", "\ud800é", ""), {"x": [1, None, 1.5, 10**30]}, BadRow("kind", "message"), "", {}, [{"b": "c" * 300}],
         Row("", "", "d")]


@pytest.fixture
def in_files(monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", 0)
    monkeypatch.setattr(spill, "BLOCK", 64)


def shown(items) -> list[str]:
    return [repr(item) for item in items]


def test_items_in_a_file_are_those_in_memory(in_files):
    found = Spill(ITEMS).finished()
    assert isinstance(found, Spill) and len(found) == len(ITEMS)
    assert shown(found) == shown(ITEMS) == shown(found[at] for at in range(len(ITEMS)))
    assert shown(found[1:5:2]) == shown(ITEMS[1:5:2]) and repr(found[-1]) == repr(ITEMS[-1])
    assert found[2].kind == "kind"
    assert found[:2] == ITEMS[:2] and found != ITEMS[:2]
    with pytest.raises(IndexError):
        found[len(ITEMS)]


def test_few_items_are_a_list():
    assert type(Spill(ITEMS).finished()) is list
    assert type(Spill(["a" * 100] * 100_000).finished()) is Spill


def test_what_can_not_be_written_stays_in_memory(in_files):
    deep: list = []
    for _ in range(50_000):
        deep = [deep]
    found = Spill(["a", deep, "b"]).finished()
    assert found[1] is deep and [item for item in found if item is not deep] == ["a", "b"]
    while deep:  # freed at once, it would overflow the stack
        deep = deep.pop()


@given(st.lists(st.binary(max_size=9), max_size=30), st.integers(0, 20), st.integers(1, 20))
def test_any_part_of_a_storage(pieces, in_memory, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "IN_MEMORY", in_memory)
        patch.setattr(spill, "BLOCK", block)
        storage, whole = Storage(), b"".join(pieces)
        for piece in pieces:
            storage.append(piece)
        assert storage.size == len(whole)
        for start in range(len(whole) + 1):
            assert storage.read(start, len(whole)) == whole[start:] and storage.read(0, start) == whole[:start]


def test_the_file_has_no_name(in_files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = Spill(["a" * 1000] * 10).finished()
    assert not rows._storage.is_in_memory and os.listdir(tmp_path) == []


def test_a_full_disk_and_a_missing_folder_are_told(in_files, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    said = re.escape(f"{tmp_path / 'none'}: cannot be written (No such file or directory)")
    with pytest.raises(UserError, match=f"{said}.*TMPDIR"):
        Spill(ITEMS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill, "write_all", full)
    (tmp_path / "a.csv").write_text("prompt,chosen,reject\na,b,c\n")
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / "a.csv", require_reject=True)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: cannot be written (No space left on device)") and "\n" not in message
    assert "free the disk, or set TMPDIR" in message


def both_ways(make):
    """What `make` gives in memory, and in files."""
    few = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "IN_MEMORY", 0)
        return few, make()


answers = st.text("ab", min_size=1, max_size=40)
rows = st.lists(st.builds(Row, st.sampled_from("pq"), answers, answers), min_size=1, max_size=12)


@given(rows, st.one_of(st.none(), st.integers(1, 30)), st.integers(50, 70), st.integers(1, 200))
def test_pairs_and_their_batches(rows, target, max_len, limit):
    (found, counts), (many, others) = both_ways(lambda: tokenize_pairs(rows, ByteTokenizer(), target, max_len, seed=1))
    few = list(found)
    assert found == many == few and counts == others
    assert list(zip(*(x.tolist() for x in many.lengths()), strict=True)) == [tuple(map(len, pair[:3])) for pair in few]
    assert batches_by_tokens(many, limit) == batches_by_tokens(few, limit)
    assert list(islice(batches_from(many, 0, limit, 3), 9)) == list(islice(batches_from(few, 0, limit, 3), 9))


def test_lists_of_a_row_that_is_repeated_are_stored_once():
    pairs, _ = tokenize_pairs([Row("p", "c", "r"), Row("q", "c", "r")], ByteTokenizer(), 100, 50, seed=0)
    assert len(pairs.lists) <= 1 + 2 * (2 + 3)  # the empty list, two answers each, and a prompt in each of three forms
    assert len(set(pairs.columns()[1])) == 2


def test_texts_and_their_batches(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"prompt": "p" * number, "completion": "c" * (number % 7 + 1)} for number in range(1, 40)]
    path.write_text("\n".join(map(json.dumps, records)))
    (found, counts), (many, others) = both_ways(lambda: read_texts(path, ByteTokenizer(), 30, 0, on_prompt=False))
    few = list(found)
    assert many == found == few and counts == others and all(isinstance(text, Text) for text in many)
    assert many.losses().tolist() == [sum(text.trained[1:]) for text in few]
    assert batches_by_tokens(many, 90) == batches_by_tokens(few, 90)


def whole(text: str, separator: str) -> str:
    """The same in one step: a field is quoted text between separators or ends of lines."""
    ends = rf"[{re.escape(separator)}\r\n]"
    return re.sub(rf'({ends}|\A) *("[^"]*+(?:""[^"]*+)*+") *(?={ends}|\Z)', r"\1\2", text)


@given(st.lists(st.sampled_from(['"', '""', " ", ",", "\n", "\r\n", "\r", "a", '" ', ' "', '", "', '"\n"', ";"]), max_size=40))
def test_spaces_outside_of_quotes_line_by_line(parts):
    text = "".join(parts)
    lines = re.findall(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+", text)
    assert "".join(without_outer_spaces(lines, ",")) == whole(text, ",")


PEAK = """
import json, resource, sys
from src.data.{module} import {name}
{call}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
READ = ("read", "read_pairs", "read_pairs(sys.argv[1], require_reject=True)")
TEXTS = ("examples", "read_texts", "from src.tokenizer.byte import ByteTokenizer; "
                                   "read_texts(sys.argv[1], ByteTokenizer(), 512, 0, on_prompt=False)")


@pytest.mark.slow
@pytest.mark.parametrize("job", [READ, TEXTS], ids=["pairs", "texts"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "json"])
def test_memory_hardly_grows_with_the_file(tmp_path, job, ending):
    def peak(count: int) -> float:
        """MB"""
        path, texts = tmp_path / f"{count}.{ending}", {"prompt": "p" * 150, "chosen": "c" * 150, "reject": "r" * 150}
        line = json.dumps(texts) if ending != "csv" else ",".join(texts.values())
        path.write_text({"csv": "prompt,chosen,reject\n{}", "jsonl": "{}", "json": "[{}]"}[ending].replace(
            "{}", ("," if ending == "json" else "\n").join([line] * count)))
        module, name, call = job
        code = PEAK.format(module=module, name=name, call=call)
        return int(subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout) / 1024

    # 50 MB of texts more, which took over 100 MB as Python's objects.
    assert peak(150_000) - peak(40_000) < 25
