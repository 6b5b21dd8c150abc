"""Spaces between a CSV field's quotes and its separators, as in `"a", "b"`: the csv module would take such quotes for text."""

import re
from collections.abc import Iterable, Iterator

# Characters; behind a quote that is not closed, a file is not searched any further.
_LONGEST = 1 << 25
_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")


def without_outer_spaces(lines: Iterable[str], separator: str) -> Iterator[str]:
    """The lines without such spaces, the same as if all were searched as one text.

    Spaces around unquoted texts stay, and so do those before a quote that does not close where the field ends.

    Args:
        lines: with their endings, which may be any of the three.
    """
    ends, text = rf"[{re.escape(separator)}\r\n]", r'"[^"]*+(?:""[^"]*+)*+'
    field = re.compile(rf'(?:{ends}|\A)( *)({text}")( *)(?={ends}|\Z)')
    field_or_open = re.compile(rf'{field.pattern}|(?P<open>(?:{ends}|\A) *{text}\Z)')
    held: list[str] = []  # from a line on that begins outside of quotes
    quotes = length = searched = 0
    for line in lines:
        count = line.count('"')
        if not held and not count:
            yield line
            continue
        held.append(line)
        quotes, length = quotes + count, length + len(line)
        # A field that goes on in the next line has an odd number of them behind it, unless a row is malformed.
        is_whole = quotes % 2 == 0 and length > searched
        changed = _changed(held, field_or_open) if is_whole and length < _LONGEST else None
        if changed is not None or length >= _LONGEST:
            yield from held if changed is None else changed
            held, quotes, length, searched = [], 0, 0, 0
        elif is_whole:
            searched = length + length // 8  # so that no text is searched too often
    if held:
        yield from _changed(held, field) or []


def _changed(lines: list[str], field: re.Pattern[str]) -> list[str] | None:
    """The lines without the spaces; None if the pattern finds a field that is open behind them."""
    whole, kept, end = "".join(lines), [], 0
    for found in field.finditer(whole):
        if found[2] is None:
            return None
        if found[1] or found[3]:
            kept += [whole[end:found.start(1)], found[2]]
            end = found.end()
    return [line[0] for line in _LINE.finditer("".join([*kept, whole[end:]]))] if kept else lines
