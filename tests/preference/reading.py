"""A file's rows, every one of which must be usable."""

from pathlib import Path

from src.preference.faults import usable
from src.preference.read import read_pairs as read
from src.preference.rows import Row


def read_pairs(path: str | Path, require_reject: bool) -> list[Row]:
    return usable(read(path, require_reject), skip_bad_rows=False)
