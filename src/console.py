"""What people read: lines on stderr and tables, of which no text is ever a command to the terminal.

File names, headers and cells are whatever their authors wrote. Control characters in them would move the cursor, rename the
window or hide what follows, and square brackets are rich's markup.
"""

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NARROWEST = 80  # columns
# C0, DEL and C1; marks that turn the direction of writing; separators that end a line; lone surrogates, which are no characters.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def say(line: str) -> None:
    """One line on stderr, at once."""
    print(printable(line), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """The text with control characters written out, such as `\\x1b`; a line break or a tab becomes a space.

    A byte of a file name that is not UTF-8, which Python holds as a lone surrogate, becomes `\\xff`.
    """
    return _UNPRINTABLE.sub(lambda found: _written_out(found[0]), text)


def short(text: str, most: int = 60) -> str:
    """A text that a message quotes, its beginning where it is long."""
    return text if len(text) <= most else text[:most - 3] + "..."


def console(stderr: bool = False) -> "Console":
    """Where tables and bars go. Nothing in a text is markup, an emoji's name, or worth a colour."""
    from rich.console import Console  # not needed for a line

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def show(table: "Table", stderr: bool = False) -> None:
    """Print a table, in a window narrower than NARROWEST as if it were not, since cells of one letter a line can't be read."""
    to = console(stderr)
    to.width = max(to.width, NARROWEST)
    to.print(table)


def _written_out(character: str) -> str:
    code = ord(character)
    if character in "\n\r\t":
        return " "
    if 0xdc80 <= code <= 0xdcff:  # how Python holds a byte that is not UTF-8
        return f"\\x{code - 0xdc00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
