"""The three forms of preferences, told apart by a table's columns: pairs, answers with a thumb each, lists of scored answers.

All become rows of prompt, chosen and reject. A list gives as many as the rule for pairs makes of it, one after another, so that
its prompt is computed once for all of them.
"""

from collections import Counter
from typing import Any, NamedTuple

from src.data.advice import advice
from src.data.columns import (
    ANSWERS,
    CONVERSATIONS,
    REJECT,
    THUMBS,
    PromptColumns,
    Table,
    Usage,
    find_column,
    find_prompt_columns,
    flag_columns,
    known_columns,
    prompt_candidate,
    read_records,
    require_rows,
)
from src.data.conversation import read_transcript
from src.data.faults import BadRow, Reading
from src.data.gaps import Gaps, find_scores
from src.data.lists import SCORE_KEYS, ListColumns, find_lists, read_list
from src.data.messages import as_flag, shown
from src.data.ranking import DEFAULT_RULE, ListCounts, PairRule, make_pairs
from src.data.rows import GENERATE, Row, Rows, pair_row, read_answer
from src.errors import UserError

CHOSEN = ("chosen", "chosen_messages", "chosen_response")


class AnswerColumns(NamedTuple):
    """Names of the columns that rows are read from, None if the table has none."""

    prompt: PromptColumns
    answer: str  # the chosen answer, or the one that a thumb is about
    reject: str | None = None
    thumb: str | None = None


def to_rows(table: Table, require_reject: bool, rule: PairRule = DEFAULT_RULE) -> Reading:
    """The table's rows, those that can't be used, and what has no effect.

    Args:
        require_reject: True if every row must be a preference: a pair or a thumb. False before reject generation, when a reject
            may be empty or absent; thumbs and lists are refused then.
        rule: which pairs a list makes.

    Raises:
        UserError: a column is missing, two forms are mixed, or it is unclear which column is the prompt.
    """
    columns = _columns(table)
    if isinstance(columns, ListColumns) or columns.thumb:
        if not require_reject:
            what = "lists of scored answers" if isinstance(columns, ListColumns) else f"single answers with a {columns.thumb}"
            raise UserError(f"{table.path}: holds {what}, which need no rejected answers; give the file to "
                            "rlhf_dpo_generate_save.py as it is")
    elif require_reject and columns.reject is None:
        _check_one_form(table, columns.answer, None)
        raise UserError(f"{table.path}: there is no reject column (found: {known_columns(table)}), so row 1 has no reject; "
                        f"{GENERATE}")
    require_rows(table)
    if isinstance(columns, ListColumns):
        return _read_lists(table, columns, rule)
    return _read_thumbs(table, columns, columns.thumb) if columns.thumb else _read_pairs(table, columns, require_reject, rule)


def _columns(table: Table) -> AnswerColumns | ListColumns:
    prompt, chosen, reject = find_prompt_columns(table), find_column(table, CHOSEN), find_column(table, REJECT)
    if chosen and reject:
        _check_one_form(table, chosen, reject)
    if chosen:
        return AnswerColumns(prompt, chosen, reject)
    if not reject and (lists := find_lists(table)):
        return lists
    thumb = None if reject else find_column(table, THUMBS)
    if reject or thumb:
        if answer := find_column(table, ANSWERS):
            return AnswerColumns(prompt, answer, reject, thumb)
        if whole := find_column(table, CONVERSATIONS):
            # The conversation includes the chosen answer, or the one with a thumb, as in ms-swift.
            return AnswerColumns(prompt if prompt.prompt != whole else prompt._replace(prompt=None), whole, reject, thumb)
    missing = "chosen" if prompt.prompt else "prompt and chosen"
    raise UserError(f"{table.path}: {table.where} lacks {missing} (found: {known_columns(table)}); {advice(table)}")


def _check_one_form(table: Table, chosen: str, reject: str | None) -> None:
    """A thumb beside pairs says whether to train on a pair; beside another answer it is unclear which of the two is meant."""
    thumb = find_column(table, THUMBS)
    answer = next((name for name in table.names if name.lower() in ANSWERS), None)
    if thumb and answer:
        what, remedy = f"pairs ({chosen}, {reject})", "save each form as a file of its own"
        if reject is None:
            what, remedy = f"a column {chosen}", f"name {chosen} prompt if it holds the prompt, else remove one form"
        raise UserError(f"{table.path}: {table.where} has {what} and single answers with a thumb ({answer}, {thumb}); {remedy}")


def _rows(table: Table, prompt: PromptColumns, others: list[str | None], require_reject: bool) -> Rows:
    candidate = None
    if prompt.prompt is None:
        candidate = prompt_candidate(table, (*others, prompt.system, prompt.history))
    return Rows(table, prompt, candidate, require_reject, Usage())


def _read_pairs(table: Table, columns: AnswerColumns, require_reject: bool, rule: PairRule) -> Reading:
    scores = find_scores(table) if rule.min_gap else []
    gaps = Gaps(scores, rule.min_gap) if scores else None
    rows = _rows(table, columns.prompt, [columns.answer, columns.reject], require_reject)

    def read(record: dict[str, Any], where: str) -> Row | None:
        if gaps and not gaps.keeps(record, where, rows.usage):
            return None
        chosen = read_answer(record, columns.answer, where, "chosen", rows.usage)
        reject = read_answer(record, columns.reject, where, "reject", rows.usage)
        return pair_row(record, chosen, reject, where, rows)

    reading = read_records(table, flag_columns(table, numbers_are_thumbs=False), rows.usage, read)
    return reading._replace(facts={"gaps": gaps.facts()}, made=gaps.words()) if gaps else reading


def _read_thumbs(table: Table, columns: AnswerColumns, thumb: str) -> Reading:
    rows = _rows(table, columns.prompt, [columns.answer, thumb], require_reject=False)
    rows.usage.columns.add(thumb)
    counts: Counter[bool] = Counter()
    name = columns.answer

    def read(record: dict[str, Any], where: str) -> Row:
        is_good = as_flag(record.get(thumb))
        if is_good is None:
            what = f"its {thumb} is {shown(record[thumb])}" if thumb in record else f"it has no {thumb}"
            raise BadRow("no thumb", f"{where}: {what}, where true or false (1 or 0) must say whether its {name} is good; "
                                     "correct it or remove the row")
        answer = read_answer(record, name, where, name, rows.usage)
        if not answer or (isinstance(answer, str) and not answer.strip()):
            raise BadRow("empty answer", f"{where} has an empty answer (its {name}); fill it in or remove the row")
        if not (columns.prompt.prompt or rows.candidate) and isinstance(answer, str) and not read_transcript(answer):
            raise BadRow("no prompt", f"{where}: there is no prompt column, and its {name} is not a conversation")
        row = pair_row(record, answer, "", where, rows)
        counts[is_good] += 1
        return row if is_good else Row(row.prompt, "", row.chosen)

    others = [flag for flag in flag_columns(table, numbers_are_thumbs=False) if flag != thumb]
    reading = read_records(table, others, rows.usage, read)
    return reading._replace(facts={"thumbs": {"up": counts[True], "down": counts[False]}},
                            made=f"answers with a thumb: {counts[True]} up, {counts[False]} down")


def _read_lists(table: Table, columns: ListColumns, rule: PairRule) -> Reading:
    rows = _rows(table, find_prompt_columns(table), [*columns.answers, *columns.scores], require_reject=True)
    counts = ListCounts(rule, () if columns.scores else SCORE_KEYS)

    def read(record: dict[str, Any], where: str) -> list[Row]:
        answers, scores = read_list(record, columns, where, rows.usage)
        pairs = [pair_row(record, answers[better], answers[worse], where, rows) for better, worse in make_pairs(scores, rule)]
        counts.add(scores, len(pairs))
        return pairs

    reading = read_records(table, flag_columns(table, numbers_are_thumbs=False), rows.usage, read)
    return reading._replace(facts={"lists": counts.facts()}, made=counts.words())
