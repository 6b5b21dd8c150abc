"""What a table's columns mean: the one place that knows the common names for the parts of a prompt, and reports unused columns.

A prompt may have its own column, and further columns that belong to it: an instruction's input (Alpaca's `input`), a system
message, the turns before it. Names are compared case-insensitively.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.data.conversation import Turn
from src.data.faults import BadRow, Reading, read_rows
from src.data.messages import as_flag, checked_text, message_turns, messages_in
from src.errors import UserError

PROMPTS = ("prompt", "instruction", "question", "query", "context_messages", "prompt_messages")
CONVERSATIONS = ("messages", "conversations", "conversation")
ABOUT = ("input", "context")  # next to a prompt: its input; the prompt itself if there is no other
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history",)  # next to a prompt: the turns before it; the prompt itself if there is no other
ANSWERS = ("completion", "response", "output", "answer")  # to a prompt; good ones, unless another column says otherwise
REJECT = ("reject", "rejected", "rejected_messages", "rejected_response")
# Columns that say whether to train on a row: thumbs of unpaired preferences, and weights.
THUMBS = ("label", "kto_tag")
FLAGS = (*THUMBS, "weight", "loss_weight", "train")
# A column could be the prompt if its name has one of these words, or its texts are as long as sentences.
_PROMPT_WORDS = re.compile("prompt|question|query|instruct|input|context|problem|request|message|convers|dialog|history|post|"
                           "task|text|title|trajectory|user|human", re.IGNORECASE)
_ID_WORDS = re.compile(r"(?:^|[_\-. ])(?:id|ids|uuid|hash|sha|index|idx|len|length|tokens|count|type|lang|language|source|"
                       "model)$", re.IGNORECASE)
_SENTENCE = 5  # words


class Table(NamedTuple):
    """A file's columns and rows, before they are interpreted."""

    path: Path
    where: str  # where the columns are named: "the header", or "the file" itself
    names: Sequence[str]  # of the columns
    records: Sequence[dict[str, Any] | BadRow]  # by name, without missing values; or why one can't be read

    def place(self, number: int) -> str:
        return f"{self.path}: row {number}"


class Usage:
    """Which columns, and which keys of messages, any row uses."""

    def __init__(self) -> None:
        self.columns: set[str] = set()
        self.unused_keys: set[str] = set()
        self.open_ended = 0  # conversations that end in an unanswered message of the user

    def notes(self, table: Table, filled: Iterable[str]) -> list[str]:
        """In words, what has a value in some of the rows read, in these columns, but no effect anywhere."""
        filled = set(filled) - self.columns
        unused = [" ".join(name.split())[:40] or "(no name)" for name in dict.fromkeys(table.names) if name in filled]
        parts = [f"{_listed(unused, 'column')}"] if unused else []
        if self.unused_keys:
            parts.append(f"{_listed(sorted(self.unused_keys), 'key')} of messages")
        if self.open_ended:
            parts.append(f"the last message of {self.open_ended} conversation{'s' * (self.open_ended > 1)}, which is the "
                         "user's")
        return [f"not used: {'; '.join(parts)}"] if parts else []


class PromptColumns(NamedTuple):
    """Names of the columns that a prompt is made of, None or empty if the table has none."""

    prompt: str | None
    about: list[str]
    system: str | None
    history: str | None
    others: frozenset[str] = frozenset()  # further columns that hold the prompt in rows where `prompt` is empty

    def filled(self, record: dict[str, Any]) -> list[str]:
        """The columns that hold a prompt in this row."""
        return [name for name, value in record.items() if (name == self.prompt or name in self.others) and not is_blank(value)]

    def of_row(self, record: dict[str, Any], where: str) -> str | None:
        """The column with this row's prompt. Raises BadRow if two hold one, unless it is the same."""
        if not self.others:
            return self.prompt
        filled = self.filled(record)
        if other := next((name for name in filled[1:] if record[name] != record[filled[0]]), None):
            raise BadRow("two prompts", f"{where} has both {filled[0]} and {other}; keep one of them")
        return filled[0] if filled else self.prompt


def find_column(table: Table, names: Sequence[str]) -> str | None:
    """The one column of these names that the table has, or None. Raises UserError if several are filled in."""
    found = _columns_of(table, names)
    if len(found) > 1:
        filled: set[str] = set()
        for record in table.records:
            if not isinstance(record, BadRow):
                filled.update(name for name, value in record.items() if name in found and not is_blank(value))
            if len(filled) > 1:
                both = " and ".join(name for name in found if name in filled)
                raise UserError(f"{table.path}: {table.where} has both {both}; keep one of them")
        return next(iter(filled), next(iter(found)))
    return next(iter(found), None)


def _columns_of(table: Table, names: Sequence[str]) -> dict[str, int]:
    """The table's columns of these names, in their order. Raises UserError if one is there more than once."""
    counts = Counter(name for name in table.names if name.lower() in names)
    for name, count in counts.items():
        if count > 1:
            raise UserError(f"{table.path}: {table.where} has the column {name} more than once; keep one of them")
    return dict(sorted(counts.items(), key=lambda item: names.index(item[0].lower())))


def find_prompt_columns(table: Table) -> PromptColumns:
    """Raises UserError if two columns could be the same part; of several prompts, each row says which it is."""
    about = [column for name in ABOUT if (column := find_column(table, (name,)))]
    prompts = list(_columns_of(table, PROMPTS)) or [name for name in [find_column(table, CONVERSATIONS)] if name]
    history = find_column(table, HISTORIES)
    if not prompts:
        prompts, about = about[:1], about[1:]
    if not prompts and history:
        prompts, history = [history], None
    prompt = prompts[0] if prompts else None
    return PromptColumns(prompt, about, find_column(table, SYSTEMS), history, frozenset(prompts[1:]))


def require_rows(table: Table) -> None:
    """Raise UserError if there are no rows."""
    if not table.records:
        raise UserError(f"{table.path}: there is no data row under {table.where}")


def known_columns(table: Table) -> str:
    """The columns' names for a message, always on one line."""
    return " ".join(", ".join(table.names).split())[:200]


def prompt_candidate(table: Table, known: Sequence[str | None]) -> str | None:
    """A column, besides the `known` ones, that could be the prompt."""
    for name in dict.fromkeys(table.names):
        if name in known:
            continue
        for record in table.records[:100]:
            value = "" if isinstance(record, BadRow) else record.get(name, "")
            words = len(value.split()) if isinstance(value, str) else 0
            named = _PROMPT_WORDS.search(name) and not _ID_WORDS.search(name)
            if words >= (1 if named else _SENTENCE) or messages_in(value, table.place(1)):
                return name
    return None


def flag_columns(table: Table, numbers_are_thumbs: bool) -> list[str]:
    """The columns of FLAGS that have only truth values, such as a `label` of thumbs, not of classes.

    Args:
        numbers_are_thumbs: whether 0 and 1 are truth values in `label` and `kto_tag`; next to pairs they may mean anything.

    Raises UserError if one of them is there more than once.
    """
    found = [name for flag in FLAGS if (name := find_column(table, (flag,)))]
    filled: set[str] = set()
    candidates = found
    for record in table.records if found else ():
        if not isinstance(record, BadRow):
            of_row = [name for name in candidates if not is_blank(record.get(name))]
            filled.update(of_row)
            others = {name for name in of_row if not _is_truth(record[name], name, numbers_are_thumbs)}
            candidates = [name for name in candidates if name not in others] if others else candidates
        if not candidates:
            break
    return [name for name in candidates if name in filled]


def _is_truth(value: Any, name: str, numbers_are_thumbs: bool) -> bool:
    if name.lower() in THUMBS and not numbers_are_thumbs and str(value).strip().isdigit():
        return False
    return as_flag(value) is not None


def read_records(table: Table, flags: Sequence[str], usage: Usage, read: Callable[[dict[str, Any], str], Any]) -> Reading:
    """`read(record, where)` of the table's rows, except rows that one of the `flags` marks as not to be learned.

    A record for which `read` returns a list gives all of its entries, with the record's number.

    Args:
        flags: from `flag_columns`.
        usage: gets the columns that `read` uses.
    """
    usage.columns |= set(flags)
    flagged_out, flagged_by = 0, set()
    filled: set[str] = set()  # columns that have a value in a row read

    def read_one(record: dict[str, Any], number: int) -> Any:
        nonlocal flagged_out
        marks = [name for name in flags if as_flag(record.get(name)) is False]
        if marks:
            flagged_out += 1
            flagged_by.update(marks)
            return None
        row = read(record, table.place(number))
        if row is not None and row != []:
            filled.update(name for name, value in record.items() if name not in filled and not is_blank(value))
        return row

    rows, numbers, faults = read_rows(table.records, read_one)
    notes, left_out = usage.notes(table, filled), ""
    if flagged_out:
        marking = " or ".join(name for name in flags if name in flagged_by)
        left_out = f"{flagged_out} row{'s' * (flagged_out > 1)} that {marking} marks as not to be learned"
        notes.insert(0, f"left out {left_out}")
    return Reading(table.path, rows, numbers, faults, notes, left_out)


def read_cell(record: dict[str, Any], column: str | None, where: str, part: str, usage: Usage) -> str | list[Turn]:
    """A cell's text unchanged, "" for none; for messages, the turns.

    Raises BadRow for anything else, and for characters that can't occur in UTF-8 text.
    """
    if column is None:
        return ""
    value = record.get(column, "")
    if not is_blank(value):
        usage.columns.add(column)
    return read_value(value, f"{where}: its {part}", usage)


def read_value(value: Any, place: str, usage: Usage) -> str | list[Turn]:
    """The same of a value that need not be a cell; `place` is the row and what the value is there."""
    if is_blank(value):
        return value if isinstance(value, str) else ""
    messages = messages_in(value, place)
    if messages is not None:
        return message_turns(messages, place, usage.unused_keys)
    if not isinstance(value, str):
        raise BadRow("no text", f"{place} is of type {type(value).__name__} where text or a list of messages is expected")
    return checked_text(value, place)


def is_blank(value: Any) -> bool:
    """Whether a cell has nothing in it."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, list | dict) and not value)


def _listed(names: Sequence[str], what: str) -> str:
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{what}{'s' * (len(names) > 1)} {', '.join(names[:12])}{more}"
