"""A row's prompt as one text, from the columns that it is made of (src/data/columns.py): system message, earlier turns, input."""

from collections.abc import Sequence
from typing import Any

from src.data.columns import HISTORIES, PromptColumns, Usage, is_blank, read_cell
from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn, clean, prompt_turns, read_transcript, write_prompt
from src.data.faults import BadRow
from src.data.messages import checked_text
from src.data.printed import parse


def read_prompt(record: dict[str, Any], columns: PromptColumns, where: str, usage: Usage) -> str:
    """A prompt with all its parts as one text: unchanged if there are no other parts, else as a transcript.

    Raises BadRow for a malformed part; an empty prompt is returned as "".
    """
    column = columns.of_row(record, where)
    if column and column.lower() in HISTORIES and isinstance(text := record.get(column), str) and text.lstrip().startswith("["):
        found = parse(text)  # a text, or what is no prompt in JSON either
        record = record | {column: found} if isinstance(found, list) else record
    prompt = read_cell(record, column, where, column or "prompt", usage)
    if isinstance(prompt, str) and not (columns.about or columns.history or columns.system):
        return prompt
    turns = prompt if isinstance(prompt, list) else prompt_turns(prompt) if prompt.strip() else []
    added = False
    for column in columns.about:
        about = read_cell(record, column, where, column, usage)
        earlier = about if isinstance(about, list) else _exchanges(about)
        if earlier:
            turns, added = _after(earlier, turns, where, column), True
        elif isinstance(about, str) and about.strip():
            *before, last = turns or [Turn(HUMAN, "")]
            turns, added = [*before, Turn(HUMAN, f"{last.text}\n{about}".strip())], True
    if history := read_history(record, columns.history, where, usage):
        turns, added = _after(history, turns, where, columns.history or ""), True
    if turns and (system := read_system(record, columns.system, where, usage)):
        turns, added = with_system(turns, system, where), True
    if isinstance(prompt, str) and not added:
        return prompt
    if turns[-1].speaker != HUMAN:
        raise BadRow("prompt without a question", f"{where}: its prompt does not end in a message of the user")
    return write_prompt(turns)


def read_system(record: dict[str, Any], column: str | None, where: str, usage: Usage) -> str:
    """The text of a system message, "" for none."""
    value = read_cell(record, column, where, column or "", usage)
    if isinstance(value, list):
        if len(value) != 1 or value[0].speaker != SYSTEM:
            raise BadRow("system message", f"{where}: its {column} is not a single system message")
        value = value[0].text
    return value.strip()


def with_system(turns: Sequence[Turn], system: str, where: str) -> list[Turn]:
    """The turns with this system message first, unless the conversation already has it; "" for none."""
    if system and turns and turns[0].speaker == SYSTEM:
        if clean(turns[0].text) != clean(system):
            raise BadRow("two system messages", f"{where} has a system message in a column and another one in its conversation; "
                                                "keep one of them")
        return list(turns)
    return [Turn(SYSTEM, system), *turns] if system else list(turns)


def read_history(record: dict[str, Any], column: str | None, where: str, usage: Usage) -> list[Turn]:
    """The turns before a prompt: messages, a transcript, or a list of questions with their answers."""
    if column is None or is_blank(value := record.get(column)):
        return []
    usage.columns.add(column)
    exchanges = parse(value) if isinstance(value, str) else value
    if isinstance(exchanges, list) and not any(isinstance(exchange, dict) for exchange in exchanges):
        return _from_exchanges(exchanges, f"{where}: its {column}")
    cell = read_cell(record, column, where, column, usage)
    turns = cell if isinstance(cell, list) else read_transcript(cell)
    if turns is None:
        raise BadRow("history", f"{where}: its {column} is neither a list of questions with their answers nor messages")
    return turns


def _from_exchanges(exchanges: Sequence[Any], place: str) -> list[Turn]:
    """The turns of questions with their answers, each a list of the two texts; an empty list has none."""
    turns = []
    for exchange in exchanges:
        if exchange == []:
            continue
        if not (isinstance(exchange, list | tuple) and len(exchange) == 2 and all(isinstance(text, str) for text in exchange)):
            raise BadRow("history", f"{place} has an entry that is not a question with its answer")
        question, answer = (checked_text(text, place) for text in exchange)
        if not question.strip() or not answer.strip():
            raise BadRow("history", f"{place} has an empty question or answer; write it out or remove the row")
        turns += [Turn(HUMAN, question), Turn(ASSISTANT, answer)]
    return turns


def _exchanges(text: str) -> list[Turn] | None:
    """The turns of a transcript that ends in an answer, else None: a prompt's input may just begin with a speaker's name."""
    turns = read_transcript(text)
    return turns if turns and len(turns) > 1 and turns[-1].speaker == ASSISTANT else None


def _after(earlier: Sequence[Turn], turns: Sequence[Turn], where: str, column: str) -> list[Turn]:
    """`turns` after `earlier` ones; a system message is moved to the beginning."""
    if not turns:
        return list(earlier)
    if earlier[-1].speaker == HUMAN and turns[0].speaker == HUMAN:
        if clean(earlier[-1].text) == clean(turns[0].text):
            return [*earlier[:-1], *turns]
        raise BadRow("history", f"{where}: its {column} ends in a message of the user other than the prompt")
    if turns[0].speaker == SYSTEM:
        return [*with_system(earlier, turns[0].text, where), *turns[1:]]
    return [*earlier, *turns]
