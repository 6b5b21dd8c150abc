"""One reader for every format that pairs come in, chosen by the file's ending."""

from pathlib import Path

from src.preference.columns import Table
from src.preference.csv import read_csv
from src.preference.faults import Reading
from src.preference.jsonl import read_jsonl
from src.preference.parquet import read_parquet
from src.preference.rows import to_pairs

READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".json": read_jsonl, ".parquet": read_parquet}


def read_table(path: str | Path) -> Table:
    """The file's columns and rows, of which nothing is understood yet; a file with another ending is read as CSV."""
    return READERS.get(Path(path).suffix.lower(), read_csv)(path)


def read_pairs(path: str | Path, require_reject: bool) -> Reading:
    """All rows of a file of preferences, and those that can't be used.

    Args:
        require_reject: True where every row must have a rejected answer; False where it may be empty or absent.

    Raises:
        UserError: the file as a whole is not as it should be.
    """
    return to_pairs(read_table(path), require_reject)
