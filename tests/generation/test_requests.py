"""Requests wait in their order, whatever is taken and given back, and it is known which prompts are still needed."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.generation.requests import Request, Waiting

prompts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), min_size=1, max_size=12)


@given(prompts, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_what_is_given_back_comes_first(prompts, steps):
    requests = [Request(row, prompt) for row, prompt in enumerate(prompts)]
    waiting, expected = Waiting(requests), deque(requests)
    waiting.survey()
    for take, keep in steps:
        taken = waiting.take(take)
        assert taken == [expected.popleft() for _ in range(min(take, len(expected)))]
        waiting.give_back(taken[keep:])
        expected.extendleft(reversed(taken[keep:]))
        assert len(waiting) == len(expected) and list(waiting) == list(expected)
        left = [request.prompt for request in expected]
        assert [waiting.need(prompt) for prompt in prompts] == [prompt in left for prompt in prompts]


@given(prompts, st.integers(0, 12))
def test_the_common_beginning_of_those_that_wait(prompts, taken):
    waiting = Waiting([Request(row, prompt) for row, prompt in enumerate(prompts)])
    waiting.survey()
    waiting.take(min(taken, len(prompts) - 1))
    left = [request.prompt for request in waiting]
    shared = [length for length in range(min(map(len, left))) if len({prompt[:length] for prompt in left}) == 1]
    assert waiting.survey() == (left[0][:max(shared)] if len(set(left)) > 1 else ())


def test_requests_that_could_not_be_read_still_wait():
    class Short(list):
        def __getitem__(self, at):
            raise MemoryError

    waiting = Waiting(Short([Request(0, (1,)), Request(1, (2,))]))
    waiting.survey()
    with pytest.raises(MemoryError):
        waiting.take(1)
    assert len(waiting) == 2 and waiting.need((1,))
