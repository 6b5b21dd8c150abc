"""Read Parquet, through pandas."""

from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import existing_file
from src.preference.columns import Table


def read_parquet(path: str | Path) -> Table:
    """The rows of a Parquet file, lists as Python's, what is missing left out.

    Raises UserError where it is missing, damaged or of another kind, or pyarrow, which pandas reads it with, is not installed.
    """
    path = existing_file(path, "Parquet file")
    try:
        import pandas
        import pyarrow
    except ImportError as error:
        raise UserError(f"{path}: Parquet needs {error.name}; pip install {error.name}, or write the file as JSONL") from None
    try:
        frame = pandas.read_parquet(path, engine="pyarrow")
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: can't be read as Parquet ({reason}); it is damaged or of another kind") from None
    columns = {str(name): frame[name].tolist() for name in frame.columns}
    records = [{name: _plain(values[index]) for name, values in columns.items()} for index in range(len(frame))]
    records = [{name: value for name, value in record.items() if value is not None} for record in records]
    return Table(path, "the file", list(columns), records)


def _plain(value: Any) -> Any:
    """Lists where pandas has arrays, None where it has one of its missing values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value or type(value).__name__ == "NAType" else value
