"""What the output is made of, against the same as lists, and with the prompts in memory and in a file."""

from pathlib import Path

import pytest

from src.data import spill
from src.data.faults import Reading
from src.data.rows import Row
from src.data.token_lists import TokenLists
from src.generation.plan import Plan
from src.generation.requests import Request

ROWS = [Row("a", "x", "old"), Row("b", "x", ""), Row("c", "x", " \n"), Row("d", "x", "kept"), Row("b", "x", "")]
READING = Reading(Path("in.csv"), ROWS, [1, 2, 4, 5, 9], [], [])
PLACES = [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (4, 0), (4, 1), (4, 2)]


def test_a_row_keeps_its_reject_or_has_as_many_places_as_rejects():
    plan = Plan(READING, 3, overwrite=False)
    assert plan.kept.tolist() == [True, False, False, True, False]
    assert [plan.place(at) for at in range(len(plan))] == PLACES
    assert list(plan.known()) == [
        (1, ROWS[0]), *[(2, Row("b", "x", ""))] * 3, *[(4, Row("c", "x", ""))] * 3, (5, ROWS[3]), *[(9, Row("b", "x", ""))] * 3]


def test_with_overwrite_no_row_keeps_its_reject():
    plan = Plan(READING, 2, overwrite=True)
    assert [plan.place(at) for at in range(len(plan))] == [(row, sample) for row in range(5) for sample in range(2)]
    assert list(plan.known()) == [(number, row._replace(reject="")) for number, row in zip(READING.numbers, ROWS, strict=True)
                                  for _ in range(2)]
    assert plan.to_answer(0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("in_memory", [spill.IN_MEMORY, 0])
def test_requests_are_for_what_the_output_lacks(in_memory, monkeypatch):
    monkeypatch.setattr(spill, "IN_MEMORY", in_memory)
    plan = Plan(READING, 3, overwrite=False)
    for done in range(len(PLACES) + 1):
        expected = [Request(row, (7, ord(ROWS[row].prompt)), sample) for row, sample in PLACES[done:] if not plan.kept[row]]
        rows = plan.to_answer(done).tolist()
        assert rows == sorted({request.row for request in expected})
        prompts = TokenLists(256)
        for row in rows:
            prompts.append([7, ord(ROWS[row].prompt)])
        requests = plan.requests(done, prompts)
        assert len(requests) == len(expected)
        assert list(requests) == requests[:] == [requests[at] for at in range(len(requests))] == expected
