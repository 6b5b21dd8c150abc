"""Rows that can't be used: all of them are found, and leaving them out is the user's decision.

Code that reads a row raises `BadRow`, or puts one in the row's place in the table. `read_rows` collects them all, `usable`
refuses the file or leaves them out, and `report_reading` reports what was left out and what was not used. Rows are counted
from 1.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from src.console import say
from src.data.spill import Numbers, Spill
from src.errors import UserError
from src.progress import bar_if_long

Record = TypeVar("Record")
RowType = TypeVar("RowType")
# The help of --skip_bad_rows.
SKIP_BAD_ROWS = "1: leave out rows that can't be used, and record their count and list, instead of refusing the file"
# Most rows of each kind that a message names; a sidecar names all.
NAMED = 20


class BadRow(UserError):
    """A row that can't be used. `kind` is the kind of fault in a few words: "empty prompt", "not JSON"."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, str(self))


class Fault(NamedTuple):
    """A row that can't be used, with the full message, which names the file and the row."""

    row: int
    kind: str
    message: str


class Reading(NamedTuple):
    """The rows read from a file, and those that can't be used."""

    path: Path
    rows: Sequence[Any]  # may be too many for memory (src/data/spill.py)
    numbers: Sequence[int]  # of each of `rows` in the file, from 1
    faults: list[Fault]
    notes: list[str]  # parts of the file that have no effect
    left_out: str = ""  # in words, how many rows the file itself marks as not to be learned, and by which column
    facts: dict[str, Any] | None = None  # of thumbs, lists or scored pairs: what the rows were made of, for sidecars and reports
    made: str = ""  # the same in words

    def row_count(self) -> int:
        """Rows of the file that `rows` are of: the pairs of a list are of one."""
        return sum(before != number for before, number in pairwise(chain([0], self.numbers)))


def read_rows(records: Sequence[Record | BadRow], read: Callable[[Record, int], RowType | list[RowType] | None]
              ) -> tuple[Sequence[RowType], Sequence[int], list[Fault]]:
    """`read(record, number)` of every record: the rows, their numbers, and the faults.

    A record for which `read` returns None is left out; one for which it returns a list gives several rows, or none.
    """
    rows: Spill[RowType] = Spill()
    numbers = Numbers()
    faults: list[Fault] = []
    with bar_if_long("rows", len(records)) as advance:
        for number, record in enumerate(records, start=1):
            advance(1)
            try:
                if isinstance(record, BadRow):
                    raise record
                row = read(record, number)
            except BadRow as fault:
                faults.append(Fault(number, fault.kind, str(fault)))
                continue
            for one in row if isinstance(row, list) else [] if row is None else [row]:
                rows.append(one)
                numbers.append(number)
    return rows.finished(), numbers, faults


def usable(reading: Reading, skip_bad_rows: bool) -> Sequence[Any]:
    """The rows.

    Raises:
        UserError: a row can't be used and `skip_bad_rows` is False, or none can; its one line lists all by kind.
    """
    if reading.faults and not skip_bad_rows:
        raise UserError(refusal(reading))
    if not reading.rows and not reading.faults and not reading.left_out:
        raise UserError(f"{reading.path}: {reading.made}, so there is no pair to learn from")
    if not reading.rows and not reading.faults:
        raise UserError(f"{reading.path}: none of its rows is to be learned: it has only {reading.left_out}; correct "
                        "that column, or remove it")
    if not reading.rows:
        besides = f" besides {reading.left_out}" if reading.left_out else f" ({reading.made})" if reading.made else ""
        raise UserError(f"{reading.path}: none of its {len(reading.faults)} rows{besides} can be used; "
                        f"{reading.faults[0].message}")
    return reading.rows


def report_reading(reading: Reading) -> None:
    """Report on stderr which parts of the file have no effect, and which rows were left out.

    Call it after all checks of the file: an error is printed alone.
    """
    report_notes(reading)
    if reading.faults:
        say(f"{reading.path}: left out {len(reading.faults)} of {_total(reading)} rows, which can't be used: "
            f"{in_words(reading.faults)}")


def report_notes(reading: Reading) -> None:
    """Report on stderr, in a line each, what the rows were made of if not of plain pairs, and what has no effect."""
    if reading.made:
        say(f"{reading.path}: {reading.made}")
    if reading.notes:
        say(f"note: {reading.path}: {'; '.join(reading.notes)}")


def refusal(reading: Reading) -> str:
    """Why a run refuses the file: all faults by kind, and the first one in full."""
    first, total = reading.faults[0], _total(reading)
    if len(reading.faults) == 1:
        return f"{first.message}; --skip_bad_rows 1 leaves the row out"
    return (f"{reading.path}: {len(reading.faults)} of {total} rows can't be used: {in_words(reading.faults)}; the first: "
            f"{first.message.removeprefix(f'{reading.path}: ')}; --skip_bad_rows 1 leaves such rows out")


def _total(reading: Reading) -> int:
    """Rows of the file, without those that it marks as not to be learned."""
    lists = (reading.facts or {}).get("lists")
    return (lists["count"] if lists else len(reading.rows)) + len(reading.faults)


def by_kind(faults: Iterable[Fault]) -> dict[str, list[int]]:
    """Kind -> the numbers of its rows; kinds with more rows first."""
    kinds: dict[str, list[int]] = {}
    for fault in faults:
        kinds.setdefault(fault.kind, []).append(fault.row)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def skipped_rows(reading: Reading) -> dict[str, Any]:
    """The rows left out, as a sidecar records them."""
    return {"count": len(reading.faults), "rows": by_kind(reading.faults)}


def in_words(faults: Iterable[Fault]) -> str:
    """`empty chosen: rows 2, 4; not JSON: row 7`"""
    return "; ".join(f"{kind}: {name_rows(rows)}" for kind, rows in by_kind(faults).items())


def name_rows(rows: Sequence[int]) -> str:
    """`row 2`, `rows 2, 4`; of many only the first."""
    more = ", ..." if len(rows) > NAMED else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:NAMED]))}{more}"
