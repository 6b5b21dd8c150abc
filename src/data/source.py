"""From a path to the bytes and the text of a data file: decompressed, in the encoding of its byte order mark.

The readers interpret the bytes; helpers that all of them need are here too.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from src.data.columns import CONVERSATIONS, PROMPTS
from src.data.compression import COMPRESSIONS, DAMAGED, compression_of
from src.data.faults import BadRow
from src.errors import UserError
from src.files import existing_file

DATA_FORMATS = "CSV, TSV, JSONL, JSON, Parquet or Arrow, also compressed (.gz, .bz2, .xz, .zst)"
DATA_ENDINGS = (".csv", ".tsv", ".tab", ".jsonl", ".json", ".ndjson", ".parquet", ".arrow", ".feather", ".txt")
# Names that identify a table if its form is ambiguous; not all names that a column may have.
TELLING_NAMES = frozenset((
    *PROMPTS, *CONVERSATIONS, "chosen", "reject", "rejected", "completion", "response", "output", "answer", "text"))
_PIECE = 1 << 20  # bytes decompressed at a time
# Texts shrink to a tenth, repetitive ones to a fiftieth; files made to fill memory shrink to a thousandth or less.
MOST_TIMES, MOST_WITHOUT_QUESTION = 200, 1 << 28
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"), (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def data_file(path: str | Path, what: str) -> Path:
    """`path` if it is a readable file. Else raises UserError naming `what`, and for a folder the files to choose from."""
    path = Path(path)
    if path.is_dir():
        files = [file for pattern in ("*", "*/*") for file in sorted(path.glob(pattern)) if data_ending(file) in DATA_ENDINGS]
        # Hugging Face's libraries put descriptions next to a dataset's files; these are no data.
        files = [file for file in files if not (file.suffix == ".json" and re.search("_info|_infos|_dict|^state$", file.stem))]
        which = f", such as {files[0].relative_to(path)} ({len(files)} candidates)" if files else ""
        raise UserError(f"{what}: {path} is not a file but a folder; give one of the files in it{which}")
    return existing_file(path, what)


def data_ending(path: str | Path) -> str:
    """The ending that gives a file's format, in lower case: `.csv` for `x.CSV` and for `x.csv.gz`."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    return compression_of(path) is not None


@contextmanager
def open_data(path: Path) -> Iterator[IO[bytes]]:
    """A stream of a file's content, decompressed.

    Raises UserError if the file is damaged or cut off, also within the block, or is not compressed as its ending says.
    """
    found = compression_of(path)
    named = COMPRESSIONS.get(path.suffix.lower())
    if named and found is not named:
        raise UserError(f"{path}: is not compressed with {named.name}, as its ending {path.suffix} says; download it again, or "
                        "rename it to its format")
    try:
        with found.open(path) if found else path.open("rb") as stream:
            yield stream
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        if found is None:
            raise UserError(f"{path}: cannot be read ({reason})") from None
        raise UserError(f"{path}: can't be unpacked with {found.name} ({reason}); it is damaged or cut off") from None


def read_data(path: Path) -> bytes:
    """All bytes of a file, decompressed. Raises UserError like `open_data`, and for a file made to fill memory."""
    buffer, most = io.BytesIO(), max(MOST_WITHOUT_QUESTION, MOST_TIMES * path.stat().st_size)
    with open_data(path) as stream:
        while piece := stream.read(_PIECE):
            buffer.write(piece)
            if buffer.tell() > most:
                raise UserError(f"{path}: unpacks to over {MOST_TIMES} times its size, which no texts do; give the unpacked file")
    return buffer.getvalue()


def read_text(path: Path, place: Callable[[str], str] | None) -> str:
    """The text of a file, in UTF-8 or the encoding of its byte order mark, without that mark.

    Args:
        place: describes the position of an invalid byte, from the text before it. None keeps invalid bytes of UTF-8 in the text
            as lone surrogates, for `stray_byte` to find.

    Raises:
        UserError: like `open_data`, and for an invalid byte.
    """
    data = read_data(path)
    mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    body = memoryview(data)[len(mark):]
    try:
        return str(body, encoding, "surrogateescape" if place is None and encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        offset, before = len(mark) + error.start, str(body[:error.start], encoding)
        name, where = "-".join(encoding.upper().split("-")[:2]), place(before) if place else "the file"
        raise UserError(f"{path}: {where}: byte 0x{data[offset]:02x} at offset {offset} is not {name}; "
                        "save the file as UTF-8") from None


def stray_byte(text: str, where: str) -> BadRow | None:
    """The fault of a text from `read_text` that was not UTF-8, beginning with `where`; None if there is none."""
    bad = re.search("[\0\udc80-\udcff]", text)
    if bad is None:
        return None
    what = "holds a NUL character" if bad[0] == "\0" else f"byte 0x{ord(bad[0]) - 0xdc00:02x} is not UTF-8"
    return BadRow("not UTF-8", f"{where}: {what}; save the file as UTF-8 text")


def is_missing(value: Any) -> bool:
    """Whether a cell's value is null, or NaN, which some writers use for null."""
    return value is None or (isinstance(value, float) and value != value)
