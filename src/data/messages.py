"""Chat messages as turns: lists of objects with a role and a content, as JSON or as text in a CSV's cell.

Supported are TRL's and OpenAI's `{"role", "content"}` and ShareGPT's `{"from", "value"}`, with a text or a list of parts as
content, one message or a list; a list may also be an object of lists, as `datasets` stores a Sequence. A text cell is a list of
messages if the whole cell is one: as JSON, or as pandas, numpy or `datasets` print it into a CSV.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from src.data.conversation import ASSISTANT, HUMAN, SYSTEM, Turn, joined
from src.data.faults import BadRow
from src.data.printed import parse

SPEAKERS = {"user": HUMAN, "human": HUMAN, "prompter": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT, "bot": ASSISTANT,
            "model": ASSISTANT, "chatgpt": ASSISTANT, "ai": ASSISTANT, "system": SYSTEM, "developer": SYSTEM}
# Roles that no template has.
UNSUPPORTED = ("tool", "function", "observation", "function_call", "tool_call", "ipython", "environment")
ROLE, CONTENT = ("role", "from"), ("content", "value")
# Keys of an exchange, a question with its answer, as in ms-swift and in Capybara.
EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
# Keys that say whether a message has a loss: OpenAI's and Mistral's weight, axolotl's train, ms-swift's loss.
LOSS = ("weight", "loss_weight", "train", "loss")
NUL = "a NUL character"  # in messages
# Possessive, so that no part of a text is scanned twice: otherwise a million blank lines take hours.
_BEGINS = re.compile(r"\s*+(?:array\()?\[?\s*+\{")
_A_ROLE = re.compile(rf"""(['"])(?:role|from)\1\s*:\s*(?:array\()?\[?\s*(['"])(?:{'|'.join((*SPEAKERS, *UNSUPPORTED))})\2""",
                     re.IGNORECASE)


def message_turns(messages: Sequence[Any], where: str, unused: set[str] | None = None) -> list[Turn]:
    """Turns from messages; consecutive ones of one speaker are joined.

    Args:
        where: the row and its key, for messages.
        unused: gets the keys of the messages that have no effect.

    Raises:
        BadRow: its message begins with `where`; there are no messages, one is malformed, has a role that no template has (tool),
            is a system message after others, or has no text or a weight between 0 and 1.
    """
    turns: list[Turn] = []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number},"
        if not isinstance(message, dict):
            raise BadRow("no messages", f"{place} is of type {type(message).__name__} where an object with role and content "
                                        "is expected")
        speaker = _speaker(message, place)
        text = _text(message, place, last=number == len(messages) and speaker == ASSISTANT)
        if speaker == SYSTEM and turns and turns[-1].speaker != SYSTEM:
            raise BadRow("misplaced system message", f"{place} is a system message after others; it must come first")
        trained = _has_loss(message, place)
        if turns and turns[-1].speaker == speaker == ASSISTANT and turns[-1].trained != trained:
            raise BadRow("mixed weights", f"{place} has another weight than the assistant's message before it, but both are one "
                                          "turn; join the two or remove one")
        turns.append(Turn(speaker, text, trained or speaker != ASSISTANT))
        if unused is not None:
            unused |= _without_effect(message, speaker)
    if not turns:
        raise BadRow("no messages", f"{where} is an empty list of messages; fill it in or remove the row")
    return joined(turns)


def messages_in(value: Any, where: str) -> list[Any] | None:
    """The messages in a cell, or None if it is anything else.

    Raises BadRow, beginning with `where`, for a text that begins like a list of messages but can't be read as one.
    """
    value = as_objects(value)
    if isinstance(value, list):
        return _without_exchanges(value)
    if isinstance(value, dict):
        return [value] if _first(value, ROLE) is not None or _first(value, CONTENT) is not None else None
    if not isinstance(value, str) or not _BEGINS.match(value) or not _A_ROLE.search(value):
        return None
    found = as_objects(parse(value))
    if found is None or (isinstance(found, list) and ... in found):
        raise BadRow("unreadable messages", f"{where} begins like a list of messages written as text, but can't be read as one; "
                                            "write the file as JSONL, or the cell as JSON")
    found = _without_exchanges(found if isinstance(found, list) else [found])
    return found if all(map(_is_message, found)) else None


def as_objects(value: Any) -> Any:
    """A list of objects for an object of equally long lists, which holds the same by key; anything else as it is."""
    if not isinstance(value, dict):
        return value
    lists = list(value.values())
    if not all(isinstance(entries, list | tuple) for entries in lists) or len(set(map(len, lists))) != 1 or not lists[0]:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]


def _without_exchanges(values: list[Any]) -> list[Any]:
    """Messages for a list of exchanges, objects with a question and its answer; any other list as it is."""
    if not values or not all(isinstance(value, dict) for value in values) or _first(values[0], ROLE) is not None:
        return values
    keys = next((keys for keys in EXCHANGES if set(keys) <= values[0].keys()), None)
    if keys is None:
        return values
    asked, answered = keys
    messages: list[Any] = []
    for number, exchange in enumerate(values, start=1):
        others = {key: value for key, value in exchange.items() if key not in keys}  # for the note on what has no effect
        messages.append(others | {"role": "user", "content": exchange.get(asked)})
        answer = exchange.get(answered)
        if answer or number < len(values):  # the last question may be open
            messages.append({"role": "assistant", "content": answer})
    return messages


def checked_text(text: str, where: str) -> str:
    """The text itself. Raises BadRow, beginning with `where`, for characters that can't occur in UTF-8 text."""
    if stray := stray_character(text):
        if stray == NUL:
            raise BadRow("NUL character", f"{where} holds {stray}; remove it")
        raise BadRow("not UTF-8", f"{where} holds {stray}; write the whole character, or remove it")
    return text


def stray_character(text: str) -> str | None:
    """In words, what a text has that can't occur in a UTF-8 text; None if it has nothing of the kind."""
    bad = re.search("[\0\ud800-\udfff]", text)
    if bad is None:
        return None
    return NUL if bad[0] == "\0" else "half of a character (a lone surrogate)"


def as_flag(value: Any) -> bool | None:
    """True or False for 1, 0 and their words; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float | Decimal) and value in (0, 1) else None


def _is_message(value: Any) -> bool:
    """Strict, since an answer may be JSON itself."""
    if not isinstance(value, dict) or _first(value, CONTENT) is None:
        return False
    role = _first(value, ROLE)
    return isinstance(role, str) and role.lower() in (*SPEAKERS, *UNSUPPORTED)


def _first(message: dict[str, Any], keys: Iterable[str]) -> Any | None:
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _speaker(message: dict[str, Any], place: str) -> str:
    role = _first(message, ROLE)
    speaker = SPEAKERS.get(role.lower()) if isinstance(role, str) else None
    if speaker is None:
        raise BadRow("unsupported role", f"{place} has the role {shown(role)}; supported are user, assistant and system")
    return speaker


def _text(message: dict[str, Any], place: str, last: bool) -> str:
    content = _first(message, CONTENT)
    if isinstance(content, list):
        content = "\n".join(_part(part, place) for part in content)
    if content is not None and not isinstance(content, str):
        raise BadRow("no text", f"{place} has a content of type {type(content).__name__} where text is expected")
    if content is None or not content.strip():
        kind, what = ("empty answer", "an empty answer") if last else ("empty message", "no text as its content")
        calls = "; calls of tools are not supported" if message.get("tool_calls") else ""
        raise BadRow(kind, f"{place} has {what}{calls}; write it out or remove the row")
    return checked_text(content, place)


def _part(part: Any, place: str) -> str:
    """One part of a content: `{"type": "text", "text": ...}`, `value` in place of `text` (LLaMA-Factory), or a text."""
    if isinstance(part, dict) and part.get("type", "text") == "text":
        part = part.get("text", part.get("value"))
    if not isinstance(part, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRow("no text", f"{place} has a part of type {shown(kind)} in its content; only text is supported")
    return part


def shown(value: Any) -> str:
    """Any value from a file, for a message."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):  # a whole number of thousands of digits, deeply nested lists
        return f"of type {type(value).__name__}"


def _has_loss(message: dict[str, Any], place: str) -> bool:
    flags = []
    for key in LOSS:
        value = message.get(key)
        if value is not None and value == value:  # pandas writes null as NaN
            flag = as_flag(value)
            if flag is None:
                raise BadRow("unsupported weight", f"{place} has {key} {shown(value)}; supported are 0 and 1")
            flags.append(flag)
    return all(flags)


def _without_effect(message: dict[str, Any], speaker: str) -> set[str]:
    """Keys that have a value but no effect; only for the assistant's turns do weights have one."""
    known = {*ROLE, *CONTENT}
    known |= set(LOSS) if speaker == ASSISTANT else {key for key in LOSS if not as_flag(message.get(key))}
    return {key for key, value in message.items() if key not in known and value == value and value not in (None, "", [], {})}
