"""Reads Parquet and Arrow's IPC format (Feather, and the `.arrow` of Hugging Face's `datasets`), through pyarrow.

Lists and objects become Python's; missing values are left out.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from src.data.arrow_sizes import unpacked
from src.data.columns import Table
from src.data.kinds import is_arrow
from src.data.source import MOST_TIMES, MOST_WITHOUT_QUESTION, is_compressed, is_missing, read_data
from src.errors import UserError

# More would not fit in memory as Python's objects; a few bytes can claim any number of rows without values.
MOST_ROWS = 10_000_000
_INDEX = "__index_level_"  # prefix of columns that pandas adds for unnamed row labels


def read_parquet(path: Path) -> Table:
    """Raises UserError if the file is damaged or of another kind, or pyarrow is not installed."""

    def load(source: Any) -> Any:
        import pyarrow.parquet

        schema = pyarrow.parquet.ParquetFile(source).schema
        columns = [schema.column(number) for number in range(len(schema))]
        # A text that many rows share is stored once in the file, and has to stay so in memory until the full size is checked.
        texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=texts)
        metadata = file.metadata
        _check_rows(metadata.num_rows, path)
        _check_bytes(8 * metadata.num_rows * len(columns), path)
        _check_bytes(sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)), path)
        return _table(file.iter_batches(use_threads=False), file.schema_arrow, path)

    return _read(path, "Parquet", load)


def read_arrow(path: Path) -> Table:
    """A file or a stream. Raises UserError as `read_parquet` does."""

    def load(source: Any) -> Any:
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


def _read(path: Path, kind: str, load: Callable[[Any], Any]) -> Table:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: {kind} needs pyarrow; pip install pyarrow, or write the file as JSONL") from None
    # Unless all bytes are in memory already, the reader allocates as much as Arrow's messages claim.
    data = read_data(path) if is_compressed(path) or kind == "Arrow" else None
    try:
        with pyarrow.OSFile(str(path)) if data is None else pyarrow.BufferReader(data) as source:
            table = load(source)
    except pyarrow.ArrowMemoryError as error:
        raise UserError(f"{path}: needs more memory than there is ({_reason(error)}); split it, or get it again if it is "
                        "damaged") from None
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: can't be read as {kind} ({_reason(error)}); it is damaged or of another kind") from None
    kept = [(name, column) for name, column in zip(table.column_names, table.columns, strict=True) if not name.startswith(_INDEX)]
    names, columns = [name for name, _ in kept], [_values(column, name, path) for name, column in kept]
    records = [{name: value for name, value in zip(names, values, strict=True) if not is_missing(value)}
               for values in zip(*columns, strict=True)]
    return Table(path, "the file", names, records)


def _table(batches: Iterable[Any], schema: Any, path: Path) -> Any:
    """All batches as one table, each checked before it is kept."""
    import pyarrow

    kept, rows, n_bytes, looked_at = [], 0, 0, 0
    for batch in batches:
        rows += batch.num_rows
        _check_rows(rows, path)
        # Batches may share a dictionary, which is validated again for each of them.
        looked_at += batch.get_total_buffer_size()
        _check_bytes(looked_at, path)
        # The readers do not check offsets and lengths, and in a damaged file the conversion would follow them anywhere.
        batch.validate(full=True)
        n_bytes += sum(map(unpacked, batch.columns))
        _check_bytes(n_bytes, path)
        kept.append(batch)
    return pyarrow.Table.from_batches(kept, kept[0].schema if kept else schema)


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
