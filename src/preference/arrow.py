"""Read Parquet and Arrow's IPC format (Feather, and the `.arrow` of Hugging Face's `datasets`), through pyarrow.

Lists and objects come out as Python's, what is missing is left out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.preference.columns import Table
from src.preference.kinds import is_arrow
from src.preference.source import is_compressed, is_missing, read_data

# More would not fit into memory as Python's objects; a few bytes can claim any number of rows without values.
MOST_ROWS = 10_000_000
_INDEX = "__index_level_"  # begins the names of columns that pandas adds for row labels without a name


def read_parquet(path: Path) -> Table:
    """Raises UserError where the file is damaged or of another kind, or pyarrow is not installed."""

    def load(source: Any) -> Any:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(source)
        _check_rows(file.metadata.num_rows, path)
        return file.read()

    return _read(path, "Parquet", load)


def read_arrow(path: Path) -> Table:
    """A file or a stream. Raises UserError as `read_parquet` does."""

    def load(source: Any) -> Any:
        import pyarrow.ipc

        begins = source.read(8)
        source.seek(0)
        if not is_arrow(begins):
            raise ValueError("it does not begin as Arrow does")
        with (pyarrow.ipc.open_file if begins.startswith(b"ARROW1") else pyarrow.ipc.open_stream)(source) as reader:
            return reader.read_all()

    return _read(path, "Arrow", load)


def _read(path: Path, kind: str, load: Callable[[Any], Any]) -> Table:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: {kind} needs pyarrow; pip install pyarrow, or write the file as JSONL") from None
    data = read_data(path) if is_compressed(path) else None
    try:
        with pyarrow.OSFile(str(path)) if data is None else pyarrow.BufferReader(data) as source:
            table = load(source)
        _check_rows(table.num_rows, path)
        # The readers trust offsets and lengths, and the conversion would follow those of a damaged file anywhere.
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path}: can't be read as {kind} ({_reason(error)}); it is damaged or of another kind") from None
    names = [name for name in table.column_names if not name.startswith(_INDEX)]
    columns = [_values(column, name, path) for name, column in zip(table.column_names, table.columns, strict=True)
               if name in names]
    records = [{name: value for name, value in zip(names, values, strict=True) if not is_missing(value)}
               for values in zip(*columns, strict=True)]
    return Table(path, "the file", names, records)


def _check_rows(count: int, path: Path) -> None:
    if count > MOST_ROWS:
        raise UserError(f"{path}: has {count} rows, more than the {MOST_ROWS} that can be read at once; split it")


def _values(column: Any, name: str, path: Path) -> list[Any]:
    try:
        return column.to_pylist()
    except MemoryError:
        raise
    except Exception as error:  # dates beyond Python's years, time zones that it does not know, ...
        raise UserError(f"{path}: its column {name[:60]!r} of type {str(column.type)[:60]} has values that can't be read "
                        f"({_reason(error)}); remove it, or save it as text") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
