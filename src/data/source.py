"""From a path to the bytes and the text of a data file: decompressed, in the encoding of its byte order mark.

The readers interpret the bytes; helpers that all of them need are here too.
"""

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from src.data.columns import CONVERSATIONS, PROMPTS
from src.data.compression import COMPRESSIONS, DAMAGED, compression_of
from src.data.faults import BadRow
from src.data.spill import Storage
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


def unpacked(path: Path) -> Storage:
    """All bytes of a file, decompressed. Raises UserError like `open_data`, and for a file made to fill memory."""
    storage = Storage()
    with open_data(path) as stream:
        content = _Content(stream, b"", path)
        while piece := content.read(_PIECE):
            storage.append(piece)
    return storage


@contextmanager
def open_text(path: Path, newline: str, by_line: bool = False) -> Iterator[io.TextIOWrapper]:
    """A stream of a file's text, in UTF-8 or the encoding of its byte order mark, without that mark.

    Args:
        newline: "" for lines that end as in CSV, with any of the three line endings; "\\n" for those that end with this one.
            Both keep them as they are.
        by_line: refuse an invalid byte of UTF-8, naming its line. False keeps it in the text as a lone surrogate, for
            `stray_byte` to find.

    Raises:
        UserError: like `open_data`, for a file made to fill memory, and for an invalid byte, also within the block.
    """
    with open_data(path) as stream:
        head = stream.read(4)
        mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if head.startswith(pair[0])), (b"", "utf-8"))
        errors = "surrogateescape" if encoding == "utf-8" and not by_line else "strict"
        content = io.BufferedReader(_Content(stream, head[len(mark):], path), _PIECE)
        try:
            with io.TextIOWrapper(content, encoding, errors, newline=newline) as text:
                yield text
        except UnicodeDecodeError:
            raise _invalid_byte(path, mark, encoding, by_line) from None


class _Content(io.RawIOBase):
    """A stream's bytes after some of them; those of a file made to fill memory or a disk are refused."""

    def __init__(self, stream: IO[bytes], first: bytes, path: Path):
        self._stream, self._first, self._path = stream, first, path
        self._count, self._most = 0, max(MOST_WITHOUT_QUESTION, MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._first[:len(buffer)] or self._stream.read(len(buffer))
        self._first = self._first[len(buffer):]
        self._count += len(piece)
        if self._count > self._most:
            raise UserError(f"{self._path}: unpacks to over {MOST_TIMES} times its size, which no texts do; give the unpacked "
                            "file")
        buffer[:len(piece)] = piece
        return len(piece)


def _invalid_byte(path: Path, mark: bytes, encoding: str, by_line: bool) -> UserError:
    """What is wrong with a file that is not in this encoding."""
    decoder, line, offset = codecs.getincrementaldecoder(encoding)(), 1, len(mark)
    with open_data(path) as stream:
        stream.read(len(mark))
        while True:
            piece, waiting = stream.read(_PIECE), len(decoder.getstate()[0])
            try:
                line += decoder.decode(piece, final=not piece).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[:error.start].decode(encoding).count("\n")
                offset += error.start - waiting
                byte, name = error.object[error.start], "-".join(encoding.upper().split("-")[:2])
                return UserError(f"{path}: {f'line {line}' if by_line else 'the file'}: byte 0x{byte:02x} at offset {offset} is "
                                 f"not {name}; save the file as UTF-8")
            offset += len(piece)


def stray_byte(text: str, where: str) -> BadRow | None:
    """The fault of a text from `open_text` that was not UTF-8 or has a NUL, beginning with `where`; None if there is none."""
    bad = re.search("[\0\udc80-\udcff]", text)
    if bad is None:
        return None
    if bad[0] == "\0":
        return BadRow("NUL character", f"{where}: holds a NUL character; remove it, or save the file as UTF-8 if it is in UTF-16")
    return BadRow("not UTF-8", f"{where}: byte 0x{ord(bad[0]) - 0xdc00:02x} is not UTF-8; save the file as UTF-8 text")


def is_missing(value: Any) -> bool:
    """Whether a cell's value is null, or NaN, which some writers use for null."""
    return value is None or (isinstance(value, float) and value != value)
