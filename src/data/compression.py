"""Compressed files as streams of their content: gzip, bzip2, xz and Zstandard, recognized by the first bytes.

A file may have several members, one after another, as `cat` and parallel compressors write them. Anything after a member that is
not another whole member is damage. Python's bz2 and lzma modules take it for the end of the file, and would silently lose rows.
"""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from src.errors import UserError

# Errors of reading a stream that is damaged or cut off.
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
# Bytes read at a time; small, since the rest after each member is copied.
_READ = io.DEFAULT_BUFFER_SIZE
_XZ_PADDING = 4  # zeros after a stream come in groups of this size (The .xz File Format, 2.2)


class Compression(NamedTuple):
    name: str
    begins: re.Pattern[bytes]
    open: Callable[[Path], IO[bytes]]


class _Members(io.RawIOBase):
    """The content of a file's members, concatenated. Reading raises one of `DAMAGED`.

    Args:
        new: makes a decompressor for one member.
        padding: zeros after a member come in groups of this many bytes; 0 if there may be none.
    """

    def __init__(self, path: Path, new: Callable[[], Any], padding: int = 0):
        self._file, self._new, self._padding = path.open("rb"), new, padding
        self._decompressor = new()
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = b""
        while not piece and not self._ended:
            data = b""
            if self._decompressor.eof:
                data = self._next_member()
            elif self._decompressor.needs_input and not (data := self._file.read(_READ)):
                raise EOFError("it ends within compressed data")
            if not self._ended:
                piece = self._decompressor.decompress(data, len(buffer))
        buffer[:len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next_member(self) -> bytes:
        """The beginning of the next member; empty at the end of the file."""
        data, zeros = self._decompressor.unused_data or self._file.read(_READ), 0
        while self._padding and data.startswith(b"\0"):
            rest = data.lstrip(b"\0")
            zeros += len(data) - len(rest)
            data = rest or self._file.read(_READ)
        if self._padding and zeros % self._padding:
            raise EOFError(f"padding of {zeros} bytes where it comes in groups of {self._padding}")
        self._decompressor, self._ended = self._new(), not data
        return data


def _open_bz2(path: Path) -> IO[bytes]:
    return io.BufferedReader(_Members(path, bz2.BZ2Decompressor))


def _open_xz(path: Path) -> IO[bytes]:
    return io.BufferedReader(_Members(path, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), _XZ_PADDING))


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: Zstandard needs pyarrow; pip install pyarrow, or unpack the file (zstd -d)") from None
    return pyarrow.input_stream(str(path), compression="zstd")


# Python's gzip and zstd readers refuse garbage after a member themselves.
COMPRESSIONS = {
    ".gz": Compression("gzip", re.compile(rb"\x1f\x8b"), gzip.open),  # type: ignore[arg-type]  # typeshed's GzipFile is no IO
    ".bz2": Compression("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), _open_bz2),
    ".xz": Compression("xz", re.compile(rb"\xfd7zXZ\0"), _open_xz),
    # A frame of data, or one to skip, such as pzstd writes before each of its frames (RFC 8878, 3.1).
    ".zst": Compression("Zstandard", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _open_zstd),
}


def compression_of(path: Path) -> Compression | None:
    """Determined by the first bytes, not by the file's name. Raises UserError if the file can't be read."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return next((kind for kind in COMPRESSIONS.values() if kind.begins.match(head)), None)
