"""CSVs of pairs for tests."""

from collections.abc import Iterable
from pathlib import Path

from src.data.csv import HEADER, Row, format_row


def write_pairs_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a whole CSV at once."""
    Path(path).write_bytes(HEADER.encode() + b"".join(format_row(row).encode() for row in rows))
