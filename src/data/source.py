"""From a path to the bytes and the text of a data file: compression is looked through, a byte order mark says the encoding.

What the bytes mean is the readers' part; what all of them ask stands here too.
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
# Names by which a table is told where its form alone leaves a choice; they need not be all that a column may have.
TELLING_NAMES = frozenset((
    *PROMPTS, *CONVERSATIONS, "chosen", "reject", "rejected", "completion", "response", "output", "answer", "text"))
_PIECE = 1 << 20  # bytes decompressed at a time
# Texts shrink to a tenth, those that repeat themselves to a fiftieth; what is made to fill memory to a thousandth and less.
MOST_TIMES, MOST_WITHOUT_QUESTION = 200, 1 << 28
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\0\0", "utf-32-le"), (b"\0\0\xfe\xff", "utf-32-be"), (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def data_file(path: str | Path, what: str) -> Path:
    """`path` if it is a readable file. Raises UserError naming `what` otherwise, for a folder with the files to choose from."""
    path = Path(path)
    if path.is_dir():
        files = [file for pattern in ("*", "*/*") for file in sorted(path.glob(pattern)) if data_ending(file) in DATA_ENDINGS]
        # The descriptions that Hugging Face's libraries put beside a dataset's files are no data.
        files = [file for file in files if not (file.suffix == ".json" and re.search("_info|_infos|_dict|^state$", file.stem))]
        which = f", such as {files[0].relative_to(path)} ({len(files)} files could be meant)" if files else ""
        raise UserError(f"{what}: {path} is not a file but a folder; give one of the files in it{which}")
    return existing_file(path, what)


def data_ending(path: str | Path) -> str:
    """The ending that says what is in a file, in lower case: `.csv` of `x.CSV` and of `x.csv.gz`."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    return compression_of(path) is not None


@contextmanager
def open_data(path: Path) -> Iterator[IO[bytes]]:
    """A stream of what is in a file, decompressed.

    Raises UserError where the file is damaged or cut off, or is not compressed as its ending says; errors within the block too.
    """
    found = compression_of(path)
    named = COMPRESSIONS.get(path.suffix.lower())
    if named and found is not named:
        raise UserError(f"{path}: is not compressed with {named.name}, as its ending {path.suffix} says; download it again, or "
                        "rename it to what it is")
    try:
        with found.open(path) if found else path.open("rb") as stream:
            yield stream
    except DAMAGED as error:
        reason = " ".join(str(error).split())
        if found is None:
            raise UserError(f"{path}: cannot be read ({reason})") from None
        raise UserError(f"{path}: can't be unpacked with {found.name} ({reason}); it is damaged or cut off") from None


def read_data(path: Path) -> bytes:
    """All bytes of a file, decompressed. Raises UserError as `open_data` does, and for what would fill any memory."""
    buffer, most = io.BytesIO(), max(MOST_WITHOUT_QUESTION, MOST_TIMES * path.stat().st_size)
    with open_data(path) as stream:
        while piece := stream.read(_PIECE):
            buffer.write(piece)
            if buffer.tell() > most:
                raise UserError(f"{path}: unpacks to over {MOST_TIMES} times its size, as no texts do; give the unpacked file")
    return buffer.getvalue()


def read_text(path: Path, place: Callable[[str], str] | None) -> str:
    """The text of a file, in UTF-8 or what its byte order mark says, without that mark.

    Args:
        place: from the text before a byte that does not belong there to where that is, in a person's words. None keeps such bytes
            of UTF-8 in the text, as lone surrogates, for `stray_byte` to find.

    Raises:
        UserError: as `open_data` does, and where a byte does not belong there.
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
    """What a text of `read_text` holds that no UTF-8 has, beginning with `where`; None where it holds nothing of the kind."""
    bad = re.search("[\0\udc80-\udcff]", text)
    if bad is None:
        return None
    what = "holds a NUL character" if bad[0] == "\0" else f"byte 0x{ord(bad[0]) - 0xdc00:02x} is not UTF-8"
    return BadRow("not UTF-8", f"{where}: {what}; save the file as UTF-8 text")


def is_missing(value: Any) -> bool:
    """Whether a cell's value is null or NaN, which some writers have for null."""
    return value is None or (isinstance(value, float) and value != value)
