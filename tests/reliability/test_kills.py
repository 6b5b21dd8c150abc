"""Every script killed, interrupted, and on a disk that fails, at all calls that change its files and at seeded moments."""

import random
import signal

import pytest

from tests.reliability.kills import FAIL, FILL, KILL_AFTER, KILL_BEFORE, SIGNAL, TEAR, at_moment, at_point, points
from tests.reliability.warm import ENDED_BY, SCRIPTS

SEED = 20
MOST, MOMENTS = 40, 20  # trials of each kind for a script


def some(all_points: list, count: int, seed: int = SEED) -> list:
    """All where they are few, else a seeded sample in their order."""
    return all_points if len(all_points) <= count else sorted(random.Random(seed).sample(all_points, count))


def tried(run, job, reference, chosen) -> list[str]:
    return [line for point in chosen for line in at_point(run, job, reference, point)]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("actions", [(KILL_BEFORE, KILL_AFTER, TEAR), (FAIL, FILL), (SIGNAL,)],
                         ids=["killed", "failing disk", "signalled"])
def test_a_run_broken_off_at_a_call_loses_nothing(run, jobs, references, script, actions):
    chosen = some(points(references[script], SEED, actions), MOST)
    wrong = tried(run, jobs[script], references[script], chosen)
    assert not wrong, f"{len(wrong)} of {len(chosen)} trials:\n" + "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("numbers", [(signal.SIGKILL,), ENDED_BY], ids=["killed", "signalled"])
def test_a_run_broken_off_at_any_moment_loses_nothing(run, jobs, references, script, numbers):
    draw = random.Random(SEED)
    job, reference = jobs[script], references[script]
    wrong = [line for _ in range(MOMENTS)
             for line in at_moment(run, job, reference, draw.choice(numbers), draw.uniform(0, reference.seconds))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_few_of_them(run, jobs, references, script):
    job, reference = jobs[script], references[script]
    wrong = tried(run, job, reference, some(points(reference, SEED, (KILL_AFTER, FILL, SIGNAL)), 3))
    wrong += at_moment(run, job, reference, signal.SIGTERM, reference.seconds / 2)
    assert not wrong, "\n".join(wrong)
