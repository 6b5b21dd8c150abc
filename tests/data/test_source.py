"""Compressed files give the rows of what was compressed, and what a file is counts more than how it is named."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile

import pandas as pd
import pyarrow
import pytest

from src.data import source
from src.data.read import read_table
from src.data.rows import Row
from src.errors import UserError
from tests.data.reading import read_pairs

pytestmark = pytest.mark.usefixtures("storage")

ROWS = [Row("a, b", 'c\n"d"', "e\tf;g|h"), Row("é😀", "NA", " r ")]
FRAME = pd.DataFrame(ROWS)


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    buffer = io.BytesIO()
    FRAME.to_parquet(buffer)
    return buffer.getvalue()


def arrow(new) -> bytes:
    """`new`: pyarrow.ipc.new_file or new_stream."""
    buffer, table = io.BytesIO(), pyarrow.Table.from_pandas(FRAME)
    with new(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return buffer.getvalue()


CONTENTS = {
    ".csv": FRAME.to_csv(index=False).encode(), ".tsv": FRAME.to_csv(index=False, sep="\t").encode("utf-16"),
    ".json": json.dumps([row._asdict() for row in ROWS]).encode(), ".parquet": parquet(),
    ".jsonl": "\n".join(json.dumps(row._asdict()) for row in ROWS).encode(),
    ".arrow": arrow(pyarrow.ipc.new_stream), ".feather": arrow(pyarrow.ipc.new_file),
}
COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def put(folder, name: str, data: bytes):
    (folder / name).write_bytes(data)
    return folder / name


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_table(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message.replace(str(path), "FILE")


@pytest.mark.parametrize("ending", CONTENTS)
@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
def test_every_format_in_every_compression(tmp_path, ending, compression):
    data = COMPRESSIONS.get(compression, bytes)(CONTENTS[ending])
    assert read_pairs(put(tmp_path, f"a{ending}{compression}".upper(), data), require_reject=True) == ROWS
    if compression:  # named without it
        assert read_pairs(put(tmp_path, f"b{ending}", data), require_reject=True) == ROWS


def test_compressed_parts_one_after_another_are_one_file(tmp_path):
    begins, ends = CONTENTS[".csv"][:20], CONTENTS[".csv"][20:]
    for ending, compress in COMPRESSIONS.items():
        path = put(tmp_path, f"two.csv{ending}", compress(begins) + compress(ends))
        assert read_pairs(path, require_reject=True) == ROWS


@pytest.mark.parametrize("mark", range(0x50, 0x60))
def test_frames_to_skip_are_skipped(tmp_path, mark):
    """As pzstd writes them, before each frame (RFC 8878, 3.1.2)."""
    def skipped(content: bytes) -> bytes:
        return bytes([mark]) + b"\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content

    data = skipped(b"abcd") + zstd(CONTENTS[".csv"][:9]) + skipped(b"") + zstd(CONTENTS[".csv"][9:]) + skipped(bytes(9000))
    for name in ("a.csv.zst", "a.csv"):
        assert read_pairs(put(tmp_path, name, data), require_reject=True) == ROWS
    assert refusal(put(tmp_path, "twice.csv.gz", gzip.compress(data))) == "FILE: is compressed twice; unpack it once"
    for end in (6, 10, 25, -1):
        assert "can't be unpacked with Zstandard" in refusal(put(tmp_path, "cut.csv.zst", data[:end]))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_damaged_compression_is_told(tmp_path, compression):
    data = COMPRESSIONS[compression](CONTENTS[".csv"])
    for length in (len(data) // 2, len(data) - 1):
        message = refusal(put(tmp_path, f"cut.csv{compression}", data[:length]))
        assert message.startswith("FILE: can't be unpacked with ") and message.endswith("; it is damaged or cut off")
    for plain in (b"", CONTENTS[".csv"]):
        message = refusal(put(tmp_path, f"plain.csv{compression}", plain))
        assert message.startswith("FILE: is not compressed with ") and f"its ending {compression} says" in message
    assert refusal(put(tmp_path, "twice.csv.gz", gzip.compress(data))) == "FILE: is compressed twice; unpack it once"


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_what_follows_a_member_is_another_whole_one(tmp_path, compression):
    compress, begins, ends = COMPRESSIONS[compression], CONTENTS[".csv"][:20], CONTENTS[".csv"][20:]
    one, two = compress(begins), compress(ends)
    flipped = [two[:at] + bytes([two[at] ^ 1]) + two[at + 1:] for at in (0, 1)]
    for rest in (*flipped, two[:1], two[:4], two[:-1], b"more", b" ", b"\n", two + b"more", compress(b"") + flipped[0]):
        assert "can't be unpacked with " in refusal(put(tmp_path, f"a.csv{compression}", one + rest)), rest
    for whole in (one + compress(b"") + two, compress(b"") + one + two + compress(b""), *(
            compress(CONTENTS[".csv"][:at]) + compress(CONTENTS[".csv"][at:]) for at in range(0, len(CONTENTS[".csv"]), 7))):
        assert read_pairs(put(tmp_path, f"a.csv{compression}", whole), require_reject=True) == ROWS


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_zeros_behind_a_member_are_padding_where_its_format_has_it(tmp_path, compression):
    one, two = map(COMPRESSIONS[compression], (CONTENTS[".csv"][:20], CONTENTS[".csv"][20:]))
    allowed = {".gz": (1, 3, 4, 512, 10_000), ".xz": (4, 512, 10_000, 20_000)}.get(compression, ())
    for zeros in (1, 3, 4, 512, 8190, 10_000, 20_000):
        for data in (one + two + bytes(zeros), one + bytes(zeros) + two):
            path = put(tmp_path, f"a.csv{compression}", data)
            if zeros in allowed:
                assert read_pairs(path, require_reject=True) == ROWS
            elif compression != ".gz":
                assert "can't be unpacked with " in refusal(path), zeros
    if allowed:
        assert "can't be unpacked with " in refusal(put(tmp_path, f"a.csv{compression}", one + bytes(8) + b"more"))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_members_of_any_sizes_are_read_whole(tmp_path, compression):
    parts = [bytes([97 + size % 26]) * size for size in (0, 1, 8191, 8192, 8193, 3_000_000, 0, 70_001)]
    noise = random.Random(0).randbytes(100_000)  # whose members are longer than what is read at a time
    data = b"".join(map(COMPRESSIONS[compression], [*parts, noise, noise[:8192]]))
    content = source.unpacked(put(tmp_path, f"a.csv{compression}", data))
    assert content.read(0, content.size) == b"".join(parts) + noise + noise[:8192]


def test_a_flipped_byte_of_gzip_is_told(tmp_path):
    data = bytearray(gzip.compress(CONTENTS[".csv"]))
    data[-6] ^= 1  # in the checksum
    assert "CRC" in refusal(put(tmp_path, "flipped.csv.gz", bytes(data)))


@pytest.mark.parametrize("ending", CONTENTS)
def test_a_format_under_another_name(tmp_path, ending):
    names = (".csv", ".jsonl", ".json", ".tsv", "", ".data")
    binary = (".parquet", ".arrow") if ending in (".parquet", ".arrow", ".feather") else ()
    for name in (*names, *binary):
        assert read_pairs(put(tmp_path, f"a{name}", CONTENTS[ending]), require_reject=True) == ROWS


def test_an_archive_of_files_is_told(tmp_path):
    put(tmp_path, "a.csv", CONTENTS[".csv"])
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(tmp_path / "a.csv", "a.csv")
        assert refusal(tmp_path / name) == "FILE: is a tar archive; unpack it and give a file in it"


def test_a_folder_is_told_with_the_files_in_it(tmp_path):
    assert refusal(tmp_path) == "data file: FILE is not a file but a folder; give one of the files in it"
    (tmp_path / "train").mkdir()  # as `datasets` saves one
    for name in ("dataset_dict.json", "train/dataset_info.json", "train/state.json"):
        put(tmp_path, name, b"{}")
    for number in range(2):
        put(tmp_path, f"train/data-0000{number}-of-00002.arrow", CONTENTS[".arrow"])
    assert refusal(tmp_path).endswith("in it, such as train/data-00000-of-00002.arrow (2 candidates)")


def test_what_can_not_be_opened_is_told(tmp_path):
    assert refusal(tmp_path / "none.csv") == "data file: FILE does not exist"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == "data file: FILE is not a file"


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_what_unpacks_to_far_more_than_texts_do_is_not_unpacked(tmp_path, monkeypatch, ending):
    text = b"prompt,chosen,reject\n" + b"a,b," + b"c" * 2_000_000 + b"\n"
    path = put(tmp_path, f"rows.csv{ending}", COMPRESSIONS[ending](text))
    assert len(read_table(path).records) == 1
    monkeypatch.setattr(source, "MOST_WITHOUT_QUESTION", 1 << 20)
    assert "unpacks to over 200 times its size" in refusal(path)
    assert len(read_table(put(tmp_path, "rows.csv", text)).records) == 1
