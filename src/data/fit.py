"""Whether a template fits a file: every row is rendered once, and a row that the template can't render is a row that can't be
used. Also counts the answers that the template changes."""

from collections.abc import Iterator, Sequence
from typing import Any

from src.data.conversation import ASSISTANT, Turn, answer_places, prompt_turns, untouched
from src.data.faults import BadRow, Fault, Reading
from src.data.rows import Row
from src.data.spill import Numbers, Spill
from src.data.templates import Template
from src.data.thinking import check_thinking
from src.errors import UserError
from src.progress import bar_if_long

AHEAD = 256  # rows


def fitted(reading: Reading, template: Template, loss_on: str = "all") -> Reading:
    """The reading without the rows that the template can't render, which are faults, and with a note on the answers it changes.

    Args:
        reading: of pairs, or of conversations and plain texts (`--sft 1`).
        loss_on: "answer" also makes a fault of an answer that is nothing but thinking.

    Raises UserError, with the first row, for a template that can render none.
    """
    faults: dict[int, Fault] = {}  # by row; of a list's pairs the first one's, which leaves the list out
    changed = answers = 0
    # Rendering takes a while.
    with bar_if_long("rows in the template", len(reading.rows), template.can_refuse or None) as advance:
        for at, (row, number) in enumerate(zip(reading.rows, reading.numbers, strict=True)):
            render_ahead(template, reading.rows, at)
            try:
                texts = _answers(row, template, loss_on)
            except BadRow as fault:
                message = f"{reading.path}: row {number}: {fault}"
                if template.fault:
                    raise UserError(message) from None
                faults.setdefault(number, Fault(number, fault.kind, message))
            else:
                answers += len(texts)
                changed += sum(template.ending.kept(text) != untouched(text) for text in texts)
            advance(1)
    rows, numbers, facts = reading.rows, reading.numbers, reading.facts
    if faults:
        rows = Spill(row for row, number in zip(rows, numbers, strict=True) if number not in faults).finished()
        numbers = Numbers(number for number in numbers if number not in faults)
    if facts and "lists" in facts and faults:
        facts = facts | {"lists": facts["lists"] | {"count": facts["lists"]["count"] - len(faults), "pairs": len(rows)}}
    notes = [f"{changed} of {answers} answers lose their blank lines, since --template {template.name} ends a turn at one; "
             "--template g1 keeps them"] if changed else []
    all_faults = sorted([*reading.faults, *faults.values()])
    return reading._replace(rows=rows, numbers=numbers, faults=all_faults, notes=[*reading.notes, *notes], facts=facts)


def render_ahead(template: Template, rows: Sequence[Any], at: int) -> None:
    """Call before row number `at` is rendered, if the rows are rendered in their order."""
    if template.can_refuse and at % AHEAD == 0:
        template.render_ahead((turns, first) for row in rows[at:at + AHEAD] for _, turns, first in conversations(row, template))


def has_turn_inside(row: Any, template: Template) -> bool:
    """Whether an answer has what begins or ends a turn of the template inside: a model that learns it runs on, or breaks off."""
    answers = [template.ending.kept(turn.text) for _, turns, _ in conversations(row, template) for turn in turns
               if turn.speaker == ASSISTANT]
    return any(mark in text for mark in template.turn_marks for text in answers)


def conversations(row: Any, template: Template) -> Iterator[tuple[str, list[Turn], int]]:
    """What is rendered of a row: its answer's name, the turns that end in it, and the number of the first answer among them.

    Of a conversation all answers are in one text, or each has its own where the template needs it; nothing of a plain text.
    """
    if isinstance(row, Row):
        before = prompt_turns(row.prompt)
        for part in ("chosen", "reject"):
            if (answer := getattr(row, part)).strip():
                yield f"its {part}", [*before, Turn(ASSISTANT, answer)], len(before)
    elif isinstance(row, str):
        return
    elif not template.answers_apart:
        yield "its answer", row.turns, row.first
    else:
        places = answer_places(row.turns, row.first)
        for number, at in enumerate(places, start=1):
            if row.turns[at].trained:
                yield _numbered("its answer", number, len(places)), row.turns[:at + 1], at


def _answers(row: Any, template: Template, loss_on: str) -> list[str]:
    """The texts of the row's answers. Raises BadRow, beginning with the answer, if the template can't render one."""
    texts: list[str] = []
    for part, turns, first in conversations(row, template):
        places = answer_places(turns, first)
        for number, at in enumerate(places, start=1):
            name = _numbered(part, number, len(places))
            _check(template, turns[:at + 1], at, name)
            if loss_on == "answer" and turns[at].trained:
                check_thinking(turns[at].text, name)
            texts.append(turns[at].text)
        if len(places) > 1:
            _check(template, turns, first, "its conversation")
    return texts


def _check(template: Template, turns: Sequence[Turn], first: int, what: str) -> None:
    if template.can_refuse:
        try:
            template.conversation(turns, first)
        except BadRow as fault:
            raise BadRow(fault.kind, f"{what} {fault}") from None


def _numbered(name: str, number: int, of: int) -> str:
    return f"{name} {number}" if of > 1 else name
