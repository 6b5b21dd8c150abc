"""From a table's columns to rows of prompt, chosen and reject, for every file format.

A prompt may have columns of its own (src/data/columns.py) or be the common beginning of chosen and reject; texts may be plain,
transcripts, or messages (TRL's dataset formats: standard and conversational, explicit and implicit prompt). Rows are counted
from 1.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

from src.data.columns import (
    ABOUT,
    CONVERSATIONS,
    PromptColumns,
    Table,
    Usage,
    find_column,
    find_prompt_columns,
    flag_columns,
    known_columns,
    prompt_candidate,
    read_cell,
    read_prompt,
    read_records,
    read_system,
    require_rows,
    with_system,
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
from src.data.faults import BadRow, Reading
from src.errors import UserError

CHOSEN = ("chosen", "chosen_messages", "chosen_response")
REJECT = ("reject", "rejected", "rejected_messages", "rejected_response")
_GENERATE = "run rlhf_generate_reject_csv.py to have the base model write it"
_NAME = re.compile(rf"\s*{ASSISTANT}:")


class Row(NamedTuple):
    """One data row; plain texts are unchanged from the file, and `reject` is "" if the file has none.

    A prompt of several turns is a transcript, which `src/data/conversation.py` reads and writes.
    """

    prompt: str
    chosen: str
    reject: str


class PairColumns(NamedTuple):
    """Names of the columns that a pair is read from, None if the table has none."""

    prompt: PromptColumns
    chosen: str
    reject: str | None


def to_pairs(table: Table, require_reject: bool) -> Reading:
    """The table's rows, those that can't be used, and what has no effect.

    Args:
        require_reject: True if every row must have a rejected answer; False if it may be empty or absent, as before reject
            generation.

    Raises:
        UserError: a column is missing, or it is unclear which one is the prompt.
    """
    columns = _columns(table, require_reject)
    require_rows(table)
    usage, candidate = Usage(), None
    if columns.prompt.prompt is None:
        candidate = prompt_candidate(table, (columns.chosen, columns.reject, columns.prompt.system, columns.prompt.history))

    def read(record: dict[str, Any], where: str) -> Row:
        return _row(record, columns, table, where, require_reject, candidate, usage)

    return read_records(table, flag_columns(table, numbers_are_thumbs=False), usage, read)


def _columns(table: Table, require_reject: bool) -> PairColumns:
    prompt, chosen, reject = find_prompt_columns(table), find_column(table, CHOSEN), find_column(table, REJECT)
    if chosen is None and reject and prompt.prompt and prompt.prompt.lower() in CONVERSATIONS:
        # The whole conversation is the chosen one, as in ms-swift.
        prompt, chosen = prompt._replace(prompt=None), prompt.prompt
    if chosen is None:
        missing = "chosen" if prompt.prompt else "prompt and chosen"
        raise UserError(f"{table.path}: {table.where} lacks {missing} (found: {known_columns(table)}); "
                        "the columns must be prompt,chosen,reject")
    if require_reject and reject is None:
        raise UserError(f"{table.path}: there is no reject column (found: {known_columns(table)}), so row 1 has no reject; "
                        f"{_GENERATE}")
    return PairColumns(prompt, chosen, reject)


def _row(record: dict[str, Any], columns: PairColumns, table: Table, where: str, require_reject: bool, candidate: str | None,
         usage: Usage) -> Row:
    chosen = _answer(record, columns.chosen, where, "chosen", usage)
    reject = _answer(record, columns.reject, where, "reject", usage)
    has_prompt = columns.prompt.prompt is not None or columns.prompt.history is not None
    prompt = None
    if has_prompt and not _is_whole(chosen):
        prompt = read_prompt(record, columns.prompt, where, usage)
        chosen, reject = without_prompt(chosen, reject, prompt)
    whole_chosen, whole_reject = (_whole_turns(answer, implicit=not has_prompt) for answer in (chosen, reject))
    if _is_whole(chosen) and not whole_reject and (other := reject if isinstance(reject, str) else reject[0].text).strip():
        whole_reject = [*chosen[:-1], Turn(ASSISTANT, other)]
    if whole_chosen or whole_reject:
        row = _from_conversations(whole_chosen, whole_reject, reject, record, columns, where, usage)
    else:
        chosen, reject = (answer if isinstance(answer, str) else answer[0].text for answer in (chosen, reject))
        if prompt is None:
            row = _shared_beginning(chosen, reject, table, where, candidate)
            if system := read_system(record, columns.prompt.system, where, usage):
                row = row._replace(prompt=write_prompt(with_system(prompt_turns(row.prompt), system, where)))
        else:
            row = Row(prompt, chosen, reject)
    return _checked(row, where, require_reject)


def _checked(row: Row, where: str, require_reject: bool) -> Row:
    for part, words in (("prompt", "prompt"), ("chosen", "chosen answer")):
        if not getattr(row, part).strip():
            raise BadRow(f"empty {words}", f"{where} has an empty {words}; fill it in or remove the row")
    if require_reject and not row.reject.strip():
        raise BadRow("no reject", f"{where} has no reject; {_GENERATE}")
    return row


def _answer(record: dict[str, Any], column: str | None, where: str, part: str, usage: Usage) -> str | list[Turn]:
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
                        record: dict[str, Any], columns: PairColumns, where: str, usage: Usage) -> Row:
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
    if columns.prompt.prompt is not None:
        if turns[0].speaker == ASSISTANT:
            raise BadRow("several answers", f"{where}: its answers have several turns; move all but the last into the prompt")
        if columns.prompt.prompt.lower() not in ABOUT:
            _check_prompt_within(record, columns.prompt.prompt, turns, where, usage)
    if system := read_system(record, columns.prompt.system, where, usage):
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


def _shared_beginning(chosen: str, reject: str, table: Table, where: str, candidate: str | None) -> Row:
    """Take the common beginning of two plain answers, in whole words, as the prompt, if no column could be the prompt."""
    if candidate is not None:
        raise UserError(f"{table.path}: {table.where} has no prompt column, and {candidate!r} could be it (found: "
                        f"{known_columns(table)}); rename it to prompt, or remove it if the answers begin with their prompt")
    alike = next((at for at, (one, other) in enumerate(zip(chosen, reject, strict=False)) if one != other), 0)
    shared = re.match(r"(?s).*\s", chosen[:alike])
    if not (shared and shared[0].strip()):
        raise BadRow("no prompt", f"{where}: there is no prompt column, and chosen and reject do not begin with a common prompt")
    return Row(shared[0], chosen[shared.end():], reject[shared.end():])
