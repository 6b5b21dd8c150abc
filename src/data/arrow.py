"""Reads Parquet and Arrow's IPC format (Feather, and the `.arrow` of Hugging Face's `datasets`), through pyarrow.

Lists and objects become Python's; missing values are left out.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from src.data.arrow_sizes import unpacked as unpacked_size
from src.data.columns import Table
from src.data.kinds import is_arrow
from src.data.source import MOST_TIMES, MOST_WITHOUT_QUESTION, is_compressed, is_missing, unpacked
from src.data.spill import Spill
from src.errors import UserError
from src.progress import counting

# A few bytes can claim any number of rows without values.
MOST_ROWS = 10_000_000
_INDEX = "__index_level_"  # prefix of columns that pandas adds for unnamed row labels
_BATCH_BYTES = 1 << 23  # about, as encoded in the file
_MOST_IN_BATCH = 1 << 16  # rows
_CONVERTED = 1 << 11  # rows at a time as Python's objects


def read_parquet(path: Path) -> Table:
    """Raises UserError if the file is damaged or of another kind, or pyarrow is not installed."""

    def load(source: Any) -> Table:
        import pyarrow.parquet

        schema = pyarrow.parquet.ParquetFile(source).schema
        columns = [schema.column(number) for number in range(len(schema))]
        # A text that many rows share is stored once in the file, and has to stay so in memory until the full size is checked.
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        # With a buffer, a row group is read piece by piece.
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts, buffer_size=1 << 20)
        metadata = file.metadata
        n_bytes = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        _check_rows(metadata.num_rows, path)
        _check_bytes(8 * metadata.num_rows * len(columns), path)
        _check_bytes(n_bytes, path)
        rows = _BATCH_BYTES * metadata.num_rows // max(n_bytes, 1)
        # One row group after another: pyarrow can't make a batch of several if a list or an object has shared texts in it.
        batches = chain.from_iterable(
            file.iter_batches(batch_size=min(max(rows, 1), _MOST_IN_BATCH), row_groups=[number], use_threads=False)
            for number in range(metadata.num_row_groups))
        return _table(batches, file.schema_arrow, path)

    return _read(path, "Parquet", load)


def read_arrow(path: Path) -> Table:
    """A file or a stream. Raises UserError as `read_parquet` does."""

    def load(source: Any) -> Table:
        import pyarrow.ipc

        begins = source.read(8)
        source.seek(0)
        if not is_arrow(begins):
            raise ValueError("it does not begin like Arrow")
        if begins.startswith(b"ARROW1"):
            with pyarrow.ipc.open_file(source) as reader:
                return _table(map(reader.get_batch, range(reader.num_record_batches)), reader.schema, path)
        with pyarrow.ipc.open_stream(source) as reader:
            return _table(reader, reader.schema, path)

    return _read(path, "Arrow", load)


def _read(path: Path, kind: str, load: Callable[[Any], Table]) -> Table:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: {kind} needs pyarrow; pip install pyarrow, or write the file as JSONL") from None
    try:
        if kind == "Parquet" and not is_compressed(path):
            with pyarrow.OSFile(str(path)) as source:
                return load(source)
        # Of a file of its own, the reader allocates as much as Arrow's messages claim.
        with _Bytes(path) as content, pyarrow.PythonFile(content, mode="r") as source:
            return load(source)
    except pyarrow.ArrowMemoryError as error:
        raise UserError(f"{path}: needs more memory than there is ({_reason(error)}); split it, or get it again if it is "
                        "damaged") from None
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: can't be read as {kind} ({_reason(error)}); it is damaged or of another kind") from None
    finally:
        pyarrow.default_memory_pool().release_unused()  # hundreds of MB that it would keep for further files


class _Bytes(io.RawIOBase):
    """A file's bytes, decompressed; no more are allocated than it has."""

    def __init__(self, path: Path):
        self._storage = unpacked(path) if is_compressed(path) else None
        self._file = path.open("rb", buffering=0) if self._storage is None else None
        self._size = path.stat().st_size if self._storage is None else self._storage.size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        self._at = to + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        rest = max(self._size - self._at, 0)
        end = self._at + (rest if count is None or count < 0 else min(count, rest))
        start, self._at = self._at, end
        if self._storage is not None:
            return self._storage.read(start, end)
        assert self._file is not None
        return os.pread(self._file.fileno(), end - start, start)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


def _table(batches: Iterable[Any], schema: Any, path: Path) -> Table:
    names = [name for name in schema.names if not name.startswith(_INDEX)]
    records = Spill(counting(f"{path}: rows read", _checked(batches, path)))
    return Table(path, "the file", names, records.finished())


def _checked(batches: Iterable[Any], path: Path) -> Iterator[dict[str, Any]]:
    """The rows of all batches, each checked before it is converted."""
    rows, n_bytes, looked_at = 0, 0, 0
    for batch in batches:
        rows += batch.num_rows
        _check_rows(rows, path)
        # Batches may share a dictionary, which is validated again for each of them.
        looked_at += batch.get_total_buffer_size()
        _check_bytes(looked_at, path)
        # The readers do not check offsets and lengths, and in a damaged file the conversion would follow them anywhere.
        batch.validate(full=True)
        n_bytes += sum(map(unpacked_size, batch.columns))
        _check_bytes(n_bytes, path)
        yield from _records(batch, path)


def _records(batch: Any, path: Path) -> Iterator[dict[str, Any]]:
    """The batch's rows, without missing values."""
    for start in range(0, batch.num_rows, _CONVERTED):
        part = batch.slice(start, _CONVERTED)
        found = zip(part.schema.names, part.columns, strict=True)
        kept = [(name, column) for name, column in found if not name.startswith(_INDEX)]
        names, columns = [name for name, _ in kept], [_values(column, name, path) for name, column in kept]
        for values in zip(*columns, strict=True):
            yield {name: value for name, value in zip(names, values, strict=True) if not is_missing(value)}


def _check_rows(count: int, path: Path) -> None:
    if count > MOST_ROWS:
        raise UserError(f"{path}: has {count} rows, more than the {MOST_ROWS} that can be read at once; split it")


def _values(column: Any, name: str, path: Path) -> list[Any]:
    import pyarrow

    try:
        # Looking up a dictionary's values one by one is much slower.
        decoded = column if not pyarrow.types.is_dictionary(column.type) else column.cast(column.type.value_type)
        return decoded.to_pylist()
    except Exception as error:  # dates beyond Python's range, unknown time zones, ...
        raise UserError(f"{path}: its column {name[:60]!r} of type {str(column.type)[:60]} has values that can't be read "
                        f"({_reason(error)}); remove it, or save it as text") from None


def _check_bytes(count: int, path: Path) -> None:
    if count > max(MOST_WITHOUT_QUESTION, MOST_TIMES * path.stat().st_size):
        raise UserError(f"{path}: would take over {MOST_TIMES} times its size in memory, which no texts do; split it, or write "
                        "it as JSONL")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
