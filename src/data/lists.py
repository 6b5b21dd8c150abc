"""Lists of answers to one prompt with scores or ranks, in the forms that the field has of them.

A list is a column of objects, each an answer with its score (UltraFeedback) or its rank (Nectar); a column of answers beside a
column of as many scores or ranks (distilabel); two columns of answers, with a column of scores for each or one that compares the
two (HelpSteer, SafeRLHF, SHP); or a column of two answers, the better one first (LLaMA-Factory). A rank counts from the best
answer, 1. A score is better the higher it is.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeGuard

from src.data.columns import THUMBS, Table, Usage, find_column, is_blank, read_value
from src.data.conversation import Turn
from src.data.faults import BadRow
from src.data.messages import as_objects, shown
from src.data.printed import parse
from src.numbers import read_number

ANSWER_LISTS = ("completions", "responses", "answers", "generations", "candidates", "outputs")
SCORE_LISTS = ("scores", "ratings", "rating", "rewards")
RANK_LISTS = ("ranks", "rank", "rankings", "ranking")
# Keys of an object in a list.
_TEXTS = ("response", "answer", "completion", "text", "content", "output", "generation", "messages", "message")
_RATINGS = "annotations"  # of several aspects, each an object with a Rating
# A mean over aspects comes before UltraFeedback's overall score, which is wrong for many of its worst answers.
_SCORES = ("fine-grained_score", "fine_grained_score", _RATINGS, "overall_score", "score", "rating", "reward", "pm_score")
_RANKS = ("rank", "ranking")
SCORE_KEYS = (*_SCORES, *_RANKS)
_ORDERED = "output"  # of two answers, in LLaMA-Factory's older form
# Two columns of answers: their beginnings and their ends; and columns with one number for both, which is above 0 if the second
# answer is better, or says which one is (SafeRLHF, SHP).
_STEMS = tuple(f"{name}{mark}" for name in ("response", "answer", "completion", "output", "human_ref") for mark in ("", "_"))
_ENDS = (("1", "2"), ("0", "1"), ("a", "b"))
_PREFERENCES = ("overall_preference", "preference_strength")
# With the end of the first answer's column, and the numbers that say that the first and the second one is better.
_BETTER = {"better_response_id": ("0", (0, 1)), "labels": ("human_ref_a", (1, 0))}
_NO_SCORE = ("", "n/a", "na", "none", "null", "nan")
_LARGEST = 1e30
_LOOKED_AT = 100  # rows


class ListColumns(NamedTuple):
    """The columns that a list is read from."""

    answers: Sequence[str]  # one column of lists, or two of answers
    scores: Sequence[str] = ()  # one of lists; one or two of numbers beside two answers; none if objects hold their scores
    are_ranks: bool = False
    better: Sequence[int] = ()  # the numbers beside two answers that name the first and the second one as the better
    are_ordered: bool = False  # whether a list has two answers, the better one first, and no scores


class Scored(NamedTuple):
    """The answers of a list, each with its score, None where the file gives none."""

    answers: list[str | list[Turn]]
    scores: list[float | None]


def find_lists(table: Table) -> ListColumns | None:
    """The columns of lists, None if the table has none. Raises UserError if two columns could be the same."""
    if column := find_column(table, ANSWER_LISTS):
        if scores := find_column(table, SCORE_LISTS):
            return ListColumns((column,), (scores,))
        if ranks := find_column(table, RANK_LISTS):
            return ListColumns((column,), (ranks,), are_ranks=True)
        return ListColumns((column,)) if any(map(_has_objects, _beginning(table, column))) else None
    names = {name.lower(): name for name in table.names}
    for stem in _STEMS:
        for ends in _ENDS:
            answers = [names.get(f"{stem}{end}", "") for end in ends]
            if all(answers) and (found := _scores_of_two(names, answers, ends)):
                return found
    ordered = None if find_column(table, THUMBS) else find_column(table, (_ORDERED,))
    beginning = _beginning(table, ordered) if ordered else []
    return ListColumns((ordered,), are_ordered=True) if ordered and beginning and all(map(_are_two, beginning)) else None


def _scores_of_two(names: dict[str, str], answers: Sequence[str], ends: Sequence[str]) -> ListColumns | None:
    for name in _PREFERENCES:
        if name in names:
            return ListColumns(answers, (names[name],))
    for name, (end, better) in _BETTER.items():
        if name in names and answers[0].lower().endswith(end):
            return ListColumns(answers, (names[name],), better=better)
    for kind in ("score", "rating", "reward"):
        for mark in ("_", ""):
            scores = [names.get(f"{kind}{mark}{end}", "") for end in ends]
            if all(scores):
                return ListColumns(answers, scores)
    return None


def read_list(record: dict[str, Any], columns: ListColumns, where: str, usage: Usage) -> Scored:
    """A row's answers with their scores. Raises BadRow for anything malformed, and for an empty answer."""
    usage.columns |= {*columns.answers, *columns.scores}
    if len(columns.answers) == 2:
        found = [record.get(name) for name in columns.answers]
        scores = _of_two(record, columns, where)
        words = [f"its {name}" for name in columns.answers]
    else:
        name = columns.answers[0]
        found = _items(record.get(name), f"{where}: its {name}")
        words = [f"answer {number} of its {name}" for number in range(1, len(found) + 1)]
        if columns.scores:
            scores = _beside(record.get(columns.scores[0]), found, columns, where)
        elif columns.are_ordered:
            if len(found) != 2:
                raise BadRow("unequal lists", f"{where}: its {name} has {len(found)} entries where two answers are expected, the "
                                              "better one first")
            scores = [1.0, 0.0]
        else:
            found, scores = _of_objects(found, words, where)
    answers = [_answer(value, score, f"{where}: {word}", usage) for value, word, score in zip(found, words, scores, strict=True)]
    return Scored(answers, scores)


def _beginning(table: Table, column: str) -> list[Any]:
    """The column's first values that are not blank, with lists that are written as text read."""
    values = [record.get(column) for record in table.records[:_LOOKED_AT] if not isinstance(record, BadRow)]
    return [as_objects(parse(value) if _is_written(value) else value) for value in values if not is_blank(value)]


def _is_written(value: Any) -> TypeGuard[str]:
    """Whether a value is a text that begins like a list, or like an object of lists."""
    return isinstance(value, str) and value.lstrip().startswith(("[", "{"))


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _are_two(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _items(value: Any, place: str) -> list[Any]:
    """A list, which may be written as text in a CSV."""
    entries = as_objects(parse(value) if isinstance(value, str) else value)
    if entries is None and _is_written(value):
        raise BadRow("unreadable list", f"{place} begins like a list, but can't be read as one; write it as JSON")
    if not isinstance(entries, list | tuple) or not entries:
        raise BadRow("no list of answers", f"{place} is not a list with entries; fill it in or remove the row")
    if ... in entries:
        raise BadRow("cut list", f"{place} is cut: numpy wrote ... for entries that it left out; write the file "
                                   "as JSONL or Parquet")
    return list(entries)


def _beside(value: Any, answers: list[Any], columns: ListColumns, where: str) -> list[float | None]:
    name = columns.scores[0]
    scores = _items(value, f"{where}: its {name}")
    if len(scores) != len(answers):
        raise BadRow("unequal lists", f"{where}: its {columns.answers[0]} has {len(answers)} entries and its {name} "
                                      f"{len(scores)}; each answer needs one, or null")
    numbers = [read_score(score, f"{where}: entry {number} of its {name}") for number, score in enumerate(scores, start=1)]
    return [None if number is None else -number for number in numbers] if columns.are_ranks else numbers


def _of_two(record: dict[str, Any], columns: ListColumns, where: str) -> list[float | None]:
    numbers = [read_score(record.get(name), f"{where}: its {name}") for name in columns.scores]
    if len(numbers) == 2:
        return numbers
    if numbers[0] is None:
        return [None, None]
    if columns.better:
        if numbers[0] not in columns.better:
            raise BadRow("no score", f"{where}: its {columns.scores[0]} is {numbers[0]:g} where 0 or 1 is expected")
        return [float(numbers[0] == number) for number in columns.better]
    return [0.0, numbers[0]]


def _of_objects(found: list[Any], words: list[str], where: str) -> tuple[list[Any], list[float | None]]:
    """Answers and scores of objects, by the first kind of score that two of them have, so that no two kinds are compared."""
    found = [{} if item is None else item for item in found]
    for item, word in zip(found, words, strict=True):
        if not isinstance(item, dict):
            raise BadRow("no score", f"{where}: {word} is of type {type(item).__name__} where an object with an answer and its "
                                     "score is expected")
    scores: list[float | None] = [None] * len(found)
    for key in SCORE_KEYS:
        by_key = [_score(item, key, f"{where}: {word}") for item, word in zip(found, words, strict=True)]
        known = sum(score is not None for score in by_key)
        scores = by_key if known > 1 or scores.count(None) == len(scores) else scores
        if known > 1:
            break
    return [next((item[key] for key in _TEXTS if item.get(key) is not None), None) for item in found], scores


def _score(item: dict[str, Any], key: str, place: str) -> float | None:
    if key != _RATINGS:
        number = read_score(item.get(key), f"{place}: its {key}")
        return -number if number is not None and key in _RANKS else number
    aspects = item.get(_RATINGS)
    if not isinstance(aspects, dict):
        return None
    entries = [entry for aspect in aspects.values() for entry in (aspect if isinstance(aspect, list) else [aspect])]
    place = f"{place}: a Rating of its {_RATINGS}"
    ratings = (read_score(entry.get("Rating"), place) for entry in entries if isinstance(entry, dict))
    known = [rating for rating in ratings if rating is not None]
    return fmean(known) if known else None


def read_score(value: Any, place: str) -> float | None:
    """A number, also one written as text; None for null, NaN, and words like N/A. Raises BadRow for anything else."""
    if value is None or value != value or (isinstance(value, str) and value.strip().lower() in _NO_SCORE):
        return None
    try:
        number = read_number(value.strip()) if isinstance(value, str) else float(value)
    except (TypeError, OverflowError):
        number = None
    if number is None or abs(number) > _LARGEST:
        raise BadRow("no score", f"{place} is {shown(value)} where a number is expected; correct it, or write null for none")
    return number


def _answer(value: Any, score: float | None, place: str, usage: Usage) -> str | list[Turn]:
    # A model that failed to answer left no text and no score.
    if is_blank(value) and score is not None:
        raise BadRow("empty answer", f"{place} is empty; fill it in or remove the row")
    return read_value(value, place, usage)
