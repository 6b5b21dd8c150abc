"""Output for people: lines on stderr and tables, without any control sequences from the texts shown.

File names, headers and cells are untrusted. Control characters in them would move the cursor, rename the window or hide what
follows, and square brackets are rich's markup.
"""

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NARROWEST = 80  # columns
# C0, DEL and C1; marks that change the writing direction; line separators; lone surrogates, which are no characters.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def say(line: str) -> None:
    """Print one line on stderr, unbuffered."""
    print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with control characters escaped, such as `\\x1b`; a line break or a tab becomes a space.

    A byte of a file name that is not UTF-8, a lone surrogate in Python, becomes `\\xff`.
    """
    return _UNPRINTABLE.sub(lambda found: _escaped(found[0]), text)


def short(text: str, most: int = 60) -> str:
    """A text to quote in a message, cut if it is long."""
    return text if len(text) <= most else text[:most - 3] + "..."


def console(stderr: bool = False) -> "Console":
    """A console for tables and bars that reads no markup, emoji names or colours into texts."""
    from rich.console import Console  # not needed for a line

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show(table: "Table", stderr: bool = False) -> None:
    """Print a table at least NARROWEST wide, even in a narrower window, where cells of one letter a line can't be read."""
    to = console(stderr)
    to.width = max(to.width, NARROWEST)
    to.print(table)


def _escaped(character: str) -> str:
    code = ord(character)
    if character in "\n\r\t":
        return " "
    if 0xdc80 <= code <= 0xdcff:  # Python's representation of a byte that is not UTF-8
        return f"\\x{code - 0xdc00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
