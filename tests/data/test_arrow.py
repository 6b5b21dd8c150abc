"""Parquet and Arrow files of every type of column, and damaged ones."""

import datetime
import decimal
import io
import random

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
import pytest

from src.data import arrow
from src.data.arrow_sizes import unpacked
from src.data.read import read_pairs, read_table
from src.errors import UserError

pytestmark = pytest.mark.usefixtures("storage")

GOOD = {"prompt": ["q"], "chosen": ["good"], "reject": ["bad"]}


def parquet(folder, columns):
    table = columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def of_bytes(data: bytes) -> pyarrow.Array:
    """A text column with these bytes in its one row."""
    ends = pyarrow.py_buffer((0).to_bytes(4, "little") + len(data).to_bytes(4, "little"))
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, ends, pyarrow.py_buffer(data)])


@pytest.mark.parametrize("column", [
    pyarrow.array(["q"]).dictionary_encode(), pyarrow.array(["q"], pyarrow.large_string()),
    pyarrow.array(["q"], pyarrow.string_view()),
], ids=["dictionary", "large", "view"])
def test_every_kind_of_text_is_text(tmp_path, column):
    assert read_pairs(parquet(tmp_path, GOOD | {"prompt": column}), True).rows == [("q", "good", "bad")]


@pytest.mark.parametrize("column", [
    [decimal.Decimal("1.5")], [datetime.datetime(2020, 1, 1)], pyarrow.array([2**62], pyarrow.duration("us")), [b"\xff"],
    [[[["a"]]]], pyarrow.array([[("k", 1), ("k", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int8())), pyarrow.nulls(1),
    pyarrow.array([1.5], pyarrow.float16()),
], ids=str)
def test_a_column_that_nothing_reads_may_be_anything(tmp_path, column):
    assert read_pairs(parquet(tmp_path, GOOD | {"other": column}), True).rows == [("q", "good", "bad")]


def test_numbers_of_databases_are_thumbs_and_scores(tmp_path):
    one, zero = decimal.Decimal("1.00"), decimal.Decimal("0.00")
    thumbs = {"prompt": ["q", "r"], "completion": ["a", "b"], "label": [one, zero]}
    assert read_pairs(parquet(tmp_path, thumbs), True).rows == [("q", "a", ""), ("r", "", "b")]
    lists = {"prompt": ["q"], "responses": [["a", "b"]], "scores": [[zero, one]]}
    assert read_pairs(parquet(tmp_path, lists), True).rows == [("q", "b", "a")]


@pytest.mark.parametrize("in_group", [1, 3, 100])
def test_lists_and_objects_in_several_row_groups(tmp_path, in_group):
    rows = [{"prompt": f"q{number % 4}", "chosen": [{"role": "assistant", "content": f"good {number % 3}"}],
             "reject": [{"role": "assistant", "content": f"bad {number}"}], "tags": ["a", "b"]} for number in range(7)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=in_group)
    assert read_table(tmp_path / "rows.parquet").records == rows
    expected = [(f"q{number % 4}", f"good {number % 3}", f"bad {number}") for number in range(7)]
    assert read_pairs(tmp_path / "rows.parquet", True).rows == expected


@pytest.mark.parametrize(("columns", "words"), [
    (GOOD | {"prompt": of_bytes(b"a\xff")}, "Invalid UTF8"),
    (GOOD | {"prompt": of_bytes(b"\xed\xa0\x80")}, "Invalid UTF8"),
    (GOOD | {"other": of_bytes(b"a\xff")}, "Invalid UTF8"),
    (GOOD | {"when": pyarrow.array([2**62], pyarrow.timestamp("us"))}, "its column 'when' of type timestamp[us] has values that"),
    (GOOD | {"day": pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())}, "its column 'day' of type date32"),
    (GOOD | {"when": pyarrow.array([0], pyarrow.timestamp("s", "Mars/Base"))}, "its column 'when'"),
    (pyarrow.Table.from_arrays([pyarrow.array(["q"])] * 4, names=["prompt", "chosen", "reject", "prompt"]), "more than once"),
    (pyarrow.table({}), "lacks prompt and chosen"), ({name: pyarrow.array([], pyarrow.string()) for name in GOOD}, "no data row"),
])
def test_what_can_t_be_read_is_one_line(tmp_path, columns, words):
    path = parquet(tmp_path, columns)
    with pytest.raises(UserError) as caught:
        read_pairs(path, True)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value) and "\n" not in str(caught.value)


def test_values_of_other_types_are_faults_of_their_rows(tmp_path):
    for value in (b"q", 5, [[["a"]]], datetime.date(2020, 1, 1)):
        reading = read_pairs(parquet(tmp_path, GOOD | {"prompt": [value]}), True)
        assert len(reading.faults) == 1 and "row 1: its prompt" in reading.faults[0].message


def written(table: pyarrow.Table, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, buffer)
    else:
        with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(buffer, table.schema) as writer:
            writer.write_table(table)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_rows_without_values_are_not_read_by_the_billion(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(arrow, "MOST_ROWS", 10**5)
    table = pyarrow.table({name: pyarrow.nulls(10**6) for name in GOOD})
    whole = written(table, kind)
    (tmp_path / "rows.arrow").write_bytes(whole)
    with pytest.raises(UserError, match="has 1000000 rows, more than the 100000"):
        read_pairs(tmp_path / "rows.arrow", True)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_damaged_files_are_refused_or_read(tmp_path, kind):
    """Offsets, lengths and counts among what is damaged; none leads out of the file's memory."""
    table = pyarrow.table({"prompt": ["hello there", "what"], "chosen": ["b", "dd"], "reject": ["c", "e"],
                           "history": [[["a", "b"]], None], "m": [[{"role": "user", "content": "x"}], []]})
    whole = written(table, kind)
    path, draw = tmp_path / "rows.arrow", random.Random(0)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            new = draw.choice([bytes([draw.randrange(256)]), b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 7 + b"\x7f",
                               (10**12).to_bytes(8, "little")])
            data[place:place + len(new)] = new
        path.write_bytes(data)
        try:
            read_pairs(path, True)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_lengths_that_a_file_claims_ask_for_no_memory(tmp_path):
    path, data = tmp_path / "rows.arrow", bytearray(written(pyarrow.table(GOOD), "stream"))
    data[4:8] = (2**31 - 8).to_bytes(4, "little")  # of the first message, the schema
    path.write_bytes(data)
    before = pyarrow.default_memory_pool()
    counted = pyarrow.proxy_memory_pool(before)
    pyarrow.set_memory_pool(counted)
    try:
        with pytest.raises(UserError, match="can't be read as Arrow"):
            read_pairs(path, True)
    finally:
        pyarrow.set_memory_pool(before)
    assert counted.max_memory() < 1 << 20


@pytest.mark.parametrize("claimed", [2**40, 2**62])
def test_a_compressed_column_that_claims_more_memory_than_there_is(tmp_path, claimed):
    path, buffer = tmp_path / "rows.arrow", io.BytesIO()
    table = pyarrow.table({**GOOD, "prompt": ["q" * 5000]})
    with pyarrow.ipc.new_stream(buffer, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data, begins = buffer.getvalue(), b"\x28\xb5\x2f\xfd"  # of what zstd has compressed; before it stands the size
    size = (5000).to_bytes(8, "little") + begins
    assert data.count(size) == 1
    path.write_bytes(data.replace(size, claimed.to_bytes(8, "little") + begins))
    with pytest.raises(UserError, match="rows.arrow: (needs more memory than there is|can't be read as Arrow)"):
        read_pairs(path, True)


def shared(text, count):
    """Texts, lists, objects and maps of them that stand once in a file and are `count` rows each."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text]))
    places = pyarrow.array(range(count + 1), pyarrow.int32())
    lists = pyarrow.ListArray.from_arrays(places, texts)
    return {"text": texts, "list": lists, "object": pyarrow.StructArray.from_arrays([texts], ["content"]),
            "messages": pyarrow.ListArray.from_arrays(places, pyarrow.StructArray.from_arrays([texts], ["content"])),
            "map": pyarrow.MapArray.from_arrays(places, pyarrow.array(range(count)), texts)}


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("form", ["text", "list", "object", "messages", "map"])
def test_a_text_that_many_rows_share_does_not_fill_the_memory(tmp_path, monkeypatch, form, kind):
    monkeypatch.setattr(arrow, "MOST_WITHOUT_QUESTION", 1 << 20)
    for count, fits in ((20, True), (5000, False)):
        table = pyarrow.table({"prompt": ["q"] * count, "chosen": ["a"] * count, "reject": ["b"] * count,
                               "other": shared("x" * 10_000, count)[form]})
        path = tmp_path / "rows.arrow"
        if kind == "parquet":
            pyarrow.parquet.write_table(table, path, compression="zstd")
        else:
            with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(str(path), table.schema) as writer:
                writer.write_table(table)
        if fits:
            assert len(read_pairs(path, True).rows) == count
            continue
        before = pyarrow.total_allocated_bytes()
        with pytest.raises(UserError, match="times its size in memory"):
            read_pairs(path, True)
        assert pyarrow.total_allocated_bytes() - before < 5 << 20


@pytest.mark.parametrize(("array", "least"), [
    (pyarrow.compute.run_end_encode(pyarrow.array(["xxxxxxxx"] * 100)), 800),
    (pyarrow.ListViewArray.from_arrays([0] * 100, [1] * 100, pyarrow.array(["xxxxxxxx"])), 800),
    (pyarrow.UnionArray.from_dense(pyarrow.array([0] * 100, pyarrow.int8()), pyarrow.array([0] * 100, pyarrow.int32()),
                                   [pyarrow.array(["xxxxxxxx"])]), 800),
    (pyarrow.array(["x" * 20, None, "x"], pyarrow.string_view()), 21), (pyarrow.array(["xxxx", None], pyarrow.large_string()), 4),
    (pyarrow.array([["x" * 9] * 3, None], pyarrow.list_(pyarrow.string(), 3)), 27), (pyarrow.array([1, 2]), 16),
    (pyarrow.nulls(3), 24), (pyarrow.array([[("k" * 9, 1)]] * 8, pyarrow.map_(pyarrow.string(), pyarrow.int8()))[4:], 36),
], ids=str)
def test_the_size_of_values_is_no_less_than_their_texts(array, least):
    assert least <= unpacked(array) <= least + 48 * len(array)
