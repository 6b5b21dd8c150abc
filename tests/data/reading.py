"""A file's rows, every one of which must be usable."""

from pathlib import Path

from src.data.faults import usable
from src.data.read import read_pairs as read
from src.data.rows import Row


def read_pairs(path: str | Path, require_reject: bool) -> list[Row]:
    return usable(read(path, require_reject), skip_bad_rows=False)
