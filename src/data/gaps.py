"""Scores beside a pair, as binarized data sets have them, and the pairs that --min_gap leaves out by them."""

from collections.abc import Sequence
from typing import Any

from src.data.columns import Table, Usage
from src.data.lists import read_score
from src.data.ranking import is_gap

_KINDS = ("score", "rating", "avg_rating", "reward")
_MARKS = ("_", "-")
_BAD = ("rejected", "reject")
_MARGIN = "margin"  # the difference itself


class Gaps:
    """The columns with the scores of pairs, and the counts of pairs that they leave out.

    Args:
        columns: from `find_scores`.
        min_gap: least difference of a pair's two scores.
    """

    def __init__(self, columns: Sequence[str], min_gap: float):
        self._columns, self._min_gap = columns, min_gap
        self.below = self.without = 0

    def keeps(self, record: dict[str, Any], where: str, usage: Usage) -> bool:
        """Whether a pair's scores differ enough, the chosen answer's being the higher. Raises BadRow for what is no score."""
        usage.columns |= set(self._columns)
        scores = [read_score(record.get(name), f"{where}: its {name}") for name in self._columns]
        chosen, reject = scores if len(scores) == 2 else (scores[0], 0.0)
        if chosen is None or reject is None:
            self.without += 1
            return False
        kept = is_gap(chosen, reject, self._min_gap)
        self.below += not kept
        return kept

    def facts(self) -> dict[str, Any]:
        """For a sidecar."""
        return {"min_gap": self._min_gap, "below": self.below, "without_score": self.without}

    def words(self) -> str:
        """What was left out, and by which columns."""
        return (f"--min_gap {self._min_gap:g} by {' and '.join(self._columns)} leaves out {self.below} pairs below it and "
                f"{self.without} without scores")


def find_scores(table: Table) -> Sequence[str]:
    """The columns of a pair's two scores, such as score_chosen and score_rejected, or of its margin; none if there are none."""
    names = {name.lower(): name for name in table.names}
    for kind in _KINDS:
        for mark in _MARKS:
            for bad in _BAD:
                for pair in ((f"{kind}{mark}chosen", f"{kind}{mark}{bad}"), (f"chosen{mark}{kind}", f"{bad}{mark}{kind}")):
                    if all(name in names for name in pair):
                        return [names[name] for name in pair]
    return [names[_MARGIN]] if _MARGIN in names else []
