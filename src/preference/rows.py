"""From a table's columns to rows of prompt, chosen and reject, whatever the file was: the one place that knows the field's names.

A prompt may stand in a column of its own or be what chosen and reject begin with; texts may be plain, transcripts, or lists of
messages (TRL's dataset formats: standard and conversational, explicit and implicit prompt). Rows are counted from 1.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.errors import UserError
from src.preference.conversation import ASSISTANT, HUMAN, Turn, message_turns, read_transcript, write_prompt

# Every name that a column may have.
NAMES = {"prompt": ("prompt",), "chosen": ("chosen",), "reject": ("reject", "rejected")}
_GENERATE = "run rlhf_generate_reject_csv.py to have the base model write it"


class Row(NamedTuple):
    """One data row, its texts just as they stand in the file; `reject` is "" where the file has none.

    A prompt of several turns is a transcript, which `src/preference/conversation.py` reads and writes.
    """

    prompt: str
    chosen: str
    reject: str


class Table(NamedTuple):
    """What a file holds before anything is known of its meaning."""

    path: Path
    where: str  # what names the columns: "the header", or "the rows" themselves
    names: Sequence[str]  # of the columns
    records: Sequence[dict[str, Any]]  # by name, without what is missing


def find_column(table: Table, names: Sequence[str]) -> str | None:
    """The one of `names` that the table has, or None. Raises UserError where it has several."""
    found = [name for name in names if name in table.names]
    for name in found:
        if table.names.count(name) > 1:
            raise UserError(f"{table.path}: {table.where} has the column {name} more than once")
    if len(found) > 1:
        raise UserError(f"{table.path}: {table.where} has both {' and '.join(found)}; keep one of them")
    return found[0] if found else None


def require_rows(table: Table) -> None:
    """Raise UserError where there is nothing under the columns."""
    if not table.records:
        raise UserError(f"{table.path}: there is no data row under {table.where}")


def known_columns(table: Table) -> str:
    """The columns' names for a message: one line, whatever the file holds."""
    return " ".join(", ".join(table.names).split())[:200]


def to_pairs(table: Table, require_reject: bool) -> list[Row]:
    """The table's rows; further columns are ignored.

    Args:
        require_reject: True where every row must have a rejected answer; False where it may be empty or absent, as it is before
            reject generation.

    Raises:
        UserError: a column is missing; a row lacks a text, holds something else than texts or messages, or has no prompt that
            its answers share. The message names the file and the row.
    """
    columns = {part: find_column(table, names) for part, names in NAMES.items()}
    if columns["chosen"] is None:
        missing = " and ".join(part for part in ("prompt", "chosen") if columns[part] is None)
        raise UserError(f"{table.path}: {table.where} lacks {missing} (found: {known_columns(table)}); "
                        "the columns must be prompt,chosen,reject")
    if require_reject and columns["reject"] is None:
        raise UserError(f"{table.path}: there is no reject column (found: {known_columns(table)}), so row 1 has no reject; "
                        f"{_GENERATE}")
    require_rows(table)
    rows = []
    for number, record in enumerate(table.records, start=1):
        where = f"{table.path}: row {number}"
        prompt, chosen, reject = (read_cell(record, columns[part], where, part) for part in Row._fields)
        row = _row(prompt if columns["prompt"] else None, chosen, reject, where)
        for part in ("prompt", "chosen"):
            if not getattr(row, part).strip():
                raise UserError(f"{where} has an empty {part}; fill it in or remove the row")
        if require_reject and not row.reject.strip():
            raise UserError(f"{where} has no reject; {_GENERATE}")
        rows.append(row)
    return rows


def read_cell(record: dict[str, Any], column: str | None, where: str, part: str) -> str | list[Turn]:
    """A cell's text just as it stands, "" where there is none; of a list of messages, the turns.

    Raises UserError for anything else, and for characters that no UTF-8 text has.
    """
    value = record.get(column, "")
    if isinstance(value, list):
        return message_turns(value, f"{where}: its {part}")
    if not isinstance(value, str):
        raise UserError(f"{where} has a {type(value).__name__} as its {part} where text or a list of messages is expected")
    bad = re.search("[\0\ud800-\udfff]", value)
    if bad:
        what = "a NUL character" if bad[0] == "\0" else "half of a character (a lone surrogate)"
        raise UserError(f"{where}: its {part} holds {what}; save the file as UTF-8 text")
    return value


def split_answer(turns: Sequence[Turn], where: str) -> tuple[list[Turn], str]:
    """A conversation's turns before its last answer, and that answer. Raises UserError where it does not end in one."""
    if len(turns) < 2 or turns[-1].speaker != ASSISTANT:
        raise UserError(f"{where} is a conversation that does not end in the assistant's answer to a prompt")
    return list(turns[:-1]), turns[-1].text


def _row(prompt: str | list[Turn] | None, chosen: str | list[Turn], reject: str | list[Turn], where: str) -> Row:
    """`prompt` is None where the file has no such column; `reject` "" where there is none."""
    whole = [_whole(answer, prompt is None) for answer in (chosen, reject)]
    if whole[0] or whole[1]:
        if not (whole[0] and (whole[1] or not reject)):
            raise UserError(f"{where}: one of chosen and reject is a conversation with its prompt and the other is not")
        turns, answer = split_answer(whole[0], f"{where}: its chosen")
        other, other_answer = split_answer(whole[1], f"{where}: its reject") if whole[1] else (turns, "")
        if other != turns:
            raise UserError(f"{where}: chosen and reject are not one conversation up to their last answers")
        if prompt is not None and turns[0].speaker == ASSISTANT:
            raise UserError(f"{where}: its answers go on for several turns; move all but the last into the prompt")
        return Row(write_prompt(turns), answer, other_answer)
    chosen, reject = (answer if isinstance(answer, str) else answer[0].text for answer in (chosen, reject))
    if prompt is None:
        return _without_prompt(chosen, reject, where)
    return Row(prompt if isinstance(prompt, str) else write_prompt(_open(prompt, where)), chosen, reject)


def _whole(answer: str | list[Turn], implicit: bool) -> list[Turn] | None:
    """The turns of an answer that has its prompt before it."""
    turns = (read_transcript(answer) if implicit else None) if isinstance(answer, str) else answer
    return None if not turns or (len(turns) == 1 and turns[0].speaker == ASSISTANT) else turns


def _open(turns: list[Turn], where: str) -> list[Turn]:
    if turns[-1].speaker != HUMAN:
        raise UserError(f"{where}: its prompt does not end in a message of the user")
    return turns


def _without_prompt(chosen: str, reject: str, where: str) -> Row:
    """The prompt is what plain answers begin with alike, in whole words."""
    alike = next((at for at, (one, other) in enumerate(zip(chosen, reject, strict=False)) if one != other), 0)
    shared = re.match(r"(?s).*\s", chosen[:alike])
    if not (shared and shared[0].strip()):
        raise UserError(f"{where}: there is no prompt column, and chosen and reject begin with no prompt that they share")
    return Row(shared[0], chosen[shared.end():], reject[shared.end():])
