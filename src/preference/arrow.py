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

_INDEX = "__index_level_"  # begins the names of columns that pandas adds for row labels without a name


def read_parquet(path: Path) -> Table:
    """Raises UserError where the file is damaged or of another kind, or pyarrow is not installed."""

    def load(source: Any) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(source).read()

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
        # The readers trust offsets and lengths, and the conversion would follow those of a damaged file anywhere.
        table.validate(full=True)
        names = [name for name in table.column_names if not name.startswith(_INDEX)]
        columns = [column.to_pylist() for name, column in zip(table.column_names, table.columns, strict=True) if name in names]
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}: can't be read as {kind} ({reason}); it is damaged or of another kind") from None
    records = [{name: value for name, value in zip(names, values, strict=True) if not is_missing(value)}
               for values in zip(*columns, strict=True)]
    return Table(path, "the file", names, records)
