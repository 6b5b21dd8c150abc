"""From a record's prompt and two answers to a row of prompt, chosen and reject, for every file format.

A prompt may have columns of its own (src/data/columns.py) or be the common beginning of chosen and reject; texts may be plain,
transcripts, or messages (TRL's dataset formats: standard and conversational, explicit and implicit prompt). Rows are counted
from 1.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from src.data.columns import (
    ABOUT,
    HISTORIES,
    PromptColumns,
    Table,
    Usage,
    known_columns,
    read_cell,
)
from src.data.conversation import (
    ASSISTANT,
    HUMAN,
    Turn,
    clean,
    ends_in_empty_answer,
    prompt_turns,
    read_transcript,
    write_prompt,
)
from src.data.faults import BadRow
from src.data.prompts import read_prompt, read_system, with_system
from src.errors import UserError

GENERATE = "run rlhf_generate_reject_csv.py to have the base model write it"
_NAME = re.compile(rf"\s*{ASSISTANT}:")


class Row(NamedTuple):
    """One data row; plain texts are unchanged from the file, and `reject` is "" if the file has none.

    An unpaired answer with a thumb is a row without a reject (up), or without a chosen answer (down). A prompt of several turns
    is a transcript, which `src/data/conversation.py` reads and writes.
    """

    prompt: str
    chosen: str
    reject: str


class Rows(NamedTuple):
    """What every row of a table is read with."""

    table: Table
    prompt: PromptColumns
    candidate: str | None  # without a prompt column: another column that could be it
    require_reject: bool
    usage: Usage


def pair_row(record: dict[str, Any], chosen: str | list[Turn], reject: str | list[Turn], where: str, rows: Rows) -> Row:
    """The row of a record's prompt with these two answers, as from `read_answer`; `reject` may be "" unless one is required.

    Raises:
        BadRow: a text is empty or malformed, or the three do not belong together.
        UserError: it is unclear which column is the prompt.
    """
    columns = rows.prompt
    has_prompt = columns.prompt is not None
    prompt = None
    if has_prompt and not _is_whole(chosen):
        prompt = read_prompt(record, columns, where, rows.usage)
        chosen, reject = without_prompt(chosen, reject, prompt)
    whole_chosen, whole_reject = (_whole_turns(answer, implicit=not has_prompt) for answer in (chosen, reject))
    if _is_whole(chosen) and not whole_reject and (other := reject if isinstance(reject, str) else reject[0].text).strip():
        whole_reject = [*chosen[:-1], Turn(ASSISTANT, other)]
    if whole_chosen or whole_reject:
        row = _from_conversations(whole_chosen, whole_reject, reject, record, columns, where, rows.usage)
    else:
        chosen, reject = (answer if isinstance(answer, str) else answer[0].text for answer in (chosen, reject))
        if prompt is None:
            row = _shared_beginning(chosen, reject, rows, where)
            if system := read_system(record, columns.system, where, rows.usage):
                row = row._replace(prompt=write_prompt(with_system(prompt_turns(row.prompt), system, where)))
        else:
            row = Row(prompt, chosen, reject)
    return _checked(row, where, rows.require_reject)


def _checked(row: Row, where: str, require_reject: bool) -> Row:
    for part, words in (("prompt", "prompt"), ("chosen", "chosen answer")):
        if not getattr(row, part).strip():
            raise BadRow(f"empty {words}", f"{where} has an empty {words}; fill it in or remove the row")
    if require_reject and not row.reject.strip():
        raise BadRow("no reject", f"{where} has no reject; {GENERATE}")
    return row


def read_answer(record: dict[str, Any], column: str | None, where: str, part: str, usage: Usage) -> str | list[Turn]:
    """An answer's text or turns. Raises BadRow if the data say that it is not to be learned."""
    cell = read_cell(record, column, where, part, usage)
    if isinstance(cell, list) and cell[-1].speaker == ASSISTANT and not cell[-1].trained:
        raise BadRow("answer without a loss", f"{where}: its {part} ends in a message of weight 0, which is not to be learned; "
                                              "remove the row or the weight")
    return cell


def _is_whole(answer: str | list[Turn]) -> TypeGuard[list[Turn]]:
    """Whether these are messages with their prompt before them."""
    return isinstance(answer, list) and not (len(answer) == 1 and answer[0].speaker == ASSISTANT)


def _whole_turns(answer: str | list[Turn], implicit: bool) -> list[Turn] | None:
    """The turns of an answer that includes its prompt; for a text only if there is no prompt column."""
    if isinstance(answer, str):
        turns = read_transcript(answer) if implicit else None
        # The fault to report is then an empty answer, not a transcript without one.
        if turns and turns[-1].speaker == HUMAN and ends_in_empty_answer(answer):
            turns.append(Turn(ASSISTANT, ""))
        return turns
    return answer if _is_whole(answer) else None


def _from_conversations(whole_chosen: list[Turn] | None, whole_reject: list[Turn] | None, reject: str | list[Turn],
                        record: dict[str, Any], columns: PromptColumns, where: str, usage: Usage) -> Row:
    """A row from two conversations that are equal up to their last answers."""
    if not (whole_chosen and (whole_reject or not reject)):
        raise BadRow("no common form", f"{where}: one of chosen and reject is a conversation with its prompt and the other is "
                                       "not")
    turns, answer = split_answer(whole_chosen, f"{where}: its chosen")
    other, other_answer = split_answer(whole_reject, f"{where}: its reject") if whole_reject else (turns, "")
    if _cleaned(other) != _cleaned(turns):
        raise BadRow("two prompts", f"{where}: chosen and reject are not the same conversation up to their last answers")
    if turns[-1].speaker != HUMAN:
        raise BadRow("prompt without a question", f"{where}: there is no message of the user before its answers")
    if columns.prompt is not None:
        if turns[0].speaker == ASSISTANT:
            raise BadRow("several answers", f"{where}: its answers have several turns; move all but the last into the prompt")
        for column in columns.filled(record):
            if column.lower() not in (*ABOUT, *HISTORIES):
                _check_prompt_within(record, column, turns, where, usage)
    if system := read_system(record, columns.system, where, usage):
        turns = with_system(turns, system, where)
    return Row(write_prompt(turns), answer, other_answer)


def _check_prompt_within(record: dict[str, Any], column: str, turns: list[Turn], where: str, usage: Usage) -> None:
    """A prompt next to a conversation that includes its prompt must be one of its messages."""
    cell = read_cell(record, column, where, column, usage)
    asked = {clean(turn.text) for turn in (prompt_turns(cell) if isinstance(cell, str) else cell) if turn.speaker == HUMAN}
    if not asked - {""} <= {clean(turn.text) for turn in turns if turn.speaker == HUMAN}:
        raise BadRow("two prompts", f"{where}: its {column} is not in the conversation of its chosen; keep one of the two")


def without_prompt(chosen: str | list[Turn], reject: str | list[Turn],
                   prompt: str) -> tuple[str | list[Turn], str | list[Turn]]:
    """Answers without the prompt repeated before them; without the speaker's name if the prompt is a transcript."""
    if not isinstance(chosen, str) or not isinstance(reject, str):
        return chosen, reject
    answers = [chosen, *([reject] if reject.strip() else [])]
    whole = [turns for answer in answers if (turns := read_transcript(answer))]
    if len(whole) == len(answers) and all(
            found[-1].speaker == ASSISTANT and _cleaned(found[:-1]) == _cleaned(prompt_turns(prompt)) for found in whole):
        answers = [found[-1].text for found in whole]
    elif all(map(_NAME.match, answers)) and read_transcript(prompt):
        answers = [_NAME.sub("", answer, count=1) for answer in answers]
    return answers[0], answers[1] if len(answers) > 1 else reject


def _cleaned(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    return [(turn.speaker, clean(turn.text)) for turn in turns]


def split_answer(turns: list[Turn], where: str) -> tuple[list[Turn], str]:
    """A conversation's turns before its last answer, and that answer. Raises BadRow if it does not end in one."""
    if len(turns) < 2 or turns[-1].speaker != ASSISTANT:
        raise BadRow("no answer", f"{where} is a conversation that does not end in the assistant's answer to a prompt")
    return list(turns[:-1]), turns[-1].text


def _shared_beginning(chosen: str, reject: str, rows: Rows, where: str) -> Row:
    """Take the common beginning of two plain answers, in whole words, as the prompt, if no column could be the prompt."""
    if rows.candidate is not None:
        raise UserError(f"{rows.table.path}: {rows.table.where} has no prompt column, and {rows.candidate!r} could be it (found: "
                        f"{known_columns(rows.table)}); rename it to prompt, or remove it if the answers begin with their prompt")
    alike = next((at for at, (one, other) in enumerate(zip(chosen, reject, strict=False)) if one != other), 0)
    shared = re.match(r"(?s).*\s", chosen[:alike])
    if not (shared and shared[0].strip()):
        raise BadRow("no prompt", f"{where}: there is no prompt column, and chosen and reject do not begin with a common prompt")
    return Row(shared[0], chosen[shared.end():], reject[shared.end():])
