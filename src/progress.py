"""The progress bar for everything that takes more than a few seconds: on stderr, with the time left."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from src.console import console, say

Item = TypeVar("Item")
# Rows from which on a pass over them takes some seconds.
MANY = 20_000
# Seconds until the first plain line, if stderr is a file or a pipe or the number of items is not known.
FIRST_LINE = 3.0
# Seconds between further ones.
LINE_EVERY = 10.0
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())


@contextmanager
def progress_bar(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`, to call with the number of further items done and a note to show.

    A bar on a terminal; elsewhere a plain line now and then, so that logs stay short.
    """
    if not sys.stderr.isatty():
        yield plain_lines(what, total, done)
        return
    with Progress(*COLUMNS, console=console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done)

        def advance(count: int, note: str = "") -> None:
            bar.update(task, advance=count, description=f"{what} {note}".rstrip())

        yield advance


def counting(what: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items; if there are more than can be read in a few seconds, a plain line now and then says how many so far."""
    due = time.monotonic() + FIRST_LINE
    for number, item in enumerate(items, start=1):
        yield item
        if number % 1000 == 0 and time.monotonic() >= due:
            due = time.monotonic() + LINE_EVERY
            say(f"{what} {number} so far")


def bar_if_long(what: str, total: int, long: bool | None = None) -> AbstractContextManager[Callable[..., None]]:
    """A `progress_bar` if the work takes more than a few seconds, which `long` says, else MANY rows."""
    is_long = total >= MANY if long is None else long
    return progress_bar(what, total) if is_long else nullcontext(lambda count, note="": None)


def plain_lines(what: str, total: int, done: int = 0) -> Callable[..., None]:
    """`advance(count, note="")` that prints a line now and then, also while another bar is on the terminal."""
    started = time.monotonic()
    due = started + FIRST_LINE
    first = done

    def advance(count: int, note: str = "") -> None:
        nonlocal done, due
        done += count
        now = time.monotonic()
        if now >= due and done > first:
            due = now + LINE_EVERY
            left = (now - started) / (done - first) * (total - done)
            say(f"{what} {done}/{total}, {left:.0f} s left {note}".rstrip())

    return advance
