"""Which pairs a list of scored answers makes, and the counts of what lists were turned into."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from src.data.faults import Reading

# best_worst: the best with the worst answer; all: every two answers; adjacent: each answer with the next in order of score.
RULES = ("best_worst", "all", "adjacent")
# The help of the two flags.
WHICH_PAIRS = ("pairs of a list of scored or ranked answers: best_worst the best with the worst, all every two, adjacent each "
               "with the next by score; equal scores make none; if not given, best_worst")
MIN_GAP = ("least difference in score, or in places of a ranking, of such a pair, and of pairs with scores of their own; if not "
           "given, any")
_EQUAL = 1e-9  # relative: scores that differ by less differ by rounding


class PairRule(NamedTuple):
    """How pairs are made of a list."""

    which: str = RULES[0]
    min_gap: float = 0.0  # least difference in score, or in places of a ranking; equal scores never make a pair


DEFAULT_RULE = PairRule()


def make_pairs(scores: Sequence[float | None], rule: PairRule) -> list[tuple[int, int]]:
    """The better and the worse answer of each pair, as indices: pairs with better answers first.

    Answers without a score are in no pair. Of equally good answers the first in the list comes first.
    """
    known = [index for index, score in enumerate(scores) if score is not None]
    order = sorted(known, key=lambda index: -_score(scores, index))
    if len(order) < 2:
        return []
    if rule.which == "best_worst":
        # Of equally bad answers, too, the first one in the list.
        pairs = [(order[0], min(order, key=lambda index: _score(scores, index)))]
    else:
        pairs = list(combinations(order, 2) if rule.which == "all" else pairwise(order))
    return [(better, worse) for better, worse in pairs
            if is_gap(_score(scores, better), _score(scores, worse), rule.min_gap)]


def is_gap(better: float, worse: float, min_gap: float) -> bool:
    """Whether the first score is higher, by at least this much; rounding decides neither."""
    gap = _gap(better, worse)
    return gap > 0 and gap >= min_gap * (1 - _EQUAL)


def pair_rule(which: str | None, min_gap: float | None) -> PairRule:
    """The rule of the two flags, None where one is not given."""
    return PairRule(which or RULES[0], min_gap or 0.0)


def rule_without_effect(reading: Reading, flags: Mapping[str, Any]) -> list[str]:
    """A line on those of these flags that are given (not None) and change nothing, since the file has no lists.

    --min_gap has an effect on pairs with scores, too.
    """
    found = reading.facts or {}
    given = [name for name, value in flags.items() if value is not None and not ("gaps" in found and name == "--min_gap")]
    if not given or "lists" in found:
        return []
    return [f"note: no effect: {', '.join(given)} ({reading.path} has no lists of scored answers)"]


def _score(scores: Sequence[float | None], index: int) -> float:
    score = scores[index]
    assert score is not None
    return score


def _gap(one: float, other: float) -> float:
    gap = one - other
    return gap if abs(gap) > _EQUAL * max(abs(one), abs(other)) else 0.0


class ListCounts:
    """What the lists of a file were turned into.

    Args:
        keys: of an answer's object under which its score may be; none if scores stand beside the answers.
    """

    def __init__(self, rule: PairRule, keys: Sequence[str] = ()) -> None:
        self.rule, self._keys = rule, keys
        self.lists = self.pairs = self.scored = self.unscored = 0
        self.without: Counter[str] = Counter()  # lists that make no pair, by reason

    def add(self, scores: Sequence[float | None], n_pairs: int) -> None:
        """Count a list with these scores that makes so many pairs."""
        known = [score for score in scores if score is not None]
        self.lists += 1
        self.pairs += n_pairs
        self.scored += len(known)
        self.unscored += len(scores) - len(known)
        if len(known) < 2:
            self.without["fewer than two scores"] += 1
        elif not n_pairs:
            equal = _gap(max(known), min(known)) == 0
            self.without["all scores equal" if equal else f"no gap of --min_gap {self.rule.min_gap:g}"] += 1

    def facts(self) -> dict[str, Any]:
        return {"rule": self.rule.which, "min_gap": self.rule.min_gap, "count": self.lists, "pairs": self.pairs,
                "without_pair": dict(self.without), "answers_without_score": self.unscored}

    def words(self) -> str:
        """`3 lists of answers make 4 pairs (all); 1 of them makes none (all scores equal)`"""
        parts = [f"{_counted(self.lists, 'list')} of answers make{'s' * (self.lists == 1)} {_counted(self.pairs, 'pair')} "
                 f"({self.rule.which}{f', gaps from {self.rule.min_gap:g}' if self.rule.min_gap else ''})"]
        if none := sum(self.without.values()):
            why = ", ".join(f"{reason}: {count}" for reason, count in self.without.most_common())
            parts.append(f"{none} of them make{'s' * (none == 1)} none ({why})")
        if self.unscored:
            where = f", which is read from {', '.join(self._keys)}" if self._keys and not self.scored else ""
            parts.append(f"{_counted(self.unscored, 'answer')} without a score{where}")
        return "; ".join(parts)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
