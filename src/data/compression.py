"""Compressed files as streams of what is in them: gzip, bzip2, xz and Zstandard, told by the first bytes.

A file may have several members, one after another, as `cat` and parallel compressors write them. Whatever follows a member and is
no whole further one is damage: Python's bz2 and lzma modules take it for the file's end, and rows are lost in silence.
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

# What reading the streams raises where a file is damaged or cut off.
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
# Bytes read at a time; what follows a member is copied for each member in them.
_READ = io.DEFAULT_BUFFER_SIZE
_XZ_PADDING = 4  # zeros behind a stream come in groups of so many (The .xz File Format, 2.2)


class Compression(NamedTuple):
    name: str
    begins: re.Pattern[bytes]
    open: Callable[[Path], IO[bytes]]


class _Members(io.RawIOBase):
    """What a file's members hold, one after another. Reading raises one of `DAMAGED`.

    Args:
        new: makes a decompressor of one member.
        padding: in groups of how many bytes zeros may stand behind a member; 0 where none may.
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
        """Its beginning; nothing at the file's end."""
        data, zeros = self._decompressor.unused_data or self._file.read(_READ), 0
        while self._padding and data.startswith(b"\0"):
            rest = data.lstrip(b"\0")
            zeros += len(data) - len(rest)
            data = rest or self._file.read(_READ)
        if self._padding and zeros % self._padding:
            raise EOFError(f"padding of {zeros} where it comes in groups of {self._padding} bytes")
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


# gzip and zstd refuse by themselves what is no further member.
COMPRESSIONS = {
    ".gz": Compression("gzip", re.compile(rb"\x1f\x8b"), gzip.open),  # type: ignore[arg-type]  # typeshed's GzipFile is no IO
    ".bz2": Compression("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), _open_bz2),
    ".xz": Compression("xz", re.compile(rb"\xfd7zXZ\0"), _open_xz),
    ".zst": Compression("Zstandard", re.compile(rb"\x28\xb5\x2f\xfd"), _open_zstd),
}


def compression_of(path: Path) -> Compression | None:
    """By the first bytes, whatever the file is named. Raises UserError where it can't be read."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return next((kind for kind in COMPRESSIONS.values() if kind.begins.match(head)), None)
