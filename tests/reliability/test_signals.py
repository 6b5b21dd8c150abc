"""Signals in a script's first seconds, which its imports take, and scripts killed as their users start them."""

import random
import signal

import pytest

from tests.reliability.jobs import clear, names
from tests.reliability.kills import at_moment, signalled_well
from tests.reliability.warm import ENDED_BY, SCRIPTS, cold

SEED = 7
MOMENTS = 6  # of each script
HOW = ("-m", "tests.reliability.at_import")


def at_import(job, number: int, modules: int) -> list[str]:
    clear(job)
    done = cold(job.script, job.words(), before=(*HOW, str(int(number)), str(modules)))
    wrong = signalled_well(done, number) + [f"left {name}" for name in names(job.out)]
    return [f"{job.script}, {signal.Signals(number).name} at import {modules}: {line}" for line in wrong]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_while_it_imports(jobs, script):
    clear(jobs[script])
    # With a flag that is refused when much has been imported and nothing been done.
    done = cold(script, [*jobs[script].words(), "--no_such_flag", "1"], before=(*HOW, "0", "0"))
    assert done.status == 2, done.err
    last, draw = int(done.out.split()[-1]), random.Random(SEED)
    wrong = [line for place in range(MOMENTS)
             for line in at_import(jobs[script], ENDED_BY[place % 3], draw.randint(1, last))]
    assert not wrong, "\n".join(wrong)


def test_a_signal_at_the_first_import(jobs):
    for number in (signal.SIGINT, signal.SIGTERM):
        assert not at_import(jobs["merge"], number, 1)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_process_of_its_own_is_killed(run, jobs, references, script):
    job, reference, draw = jobs[script], references[script], random.Random(SEED)
    clear(job)
    seconds = cold(script, job.words()).seconds
    wrong = [line for number in (signal.SIGKILL, *ENDED_BY)
             for line in at_moment(run, job, reference, number, draw.uniform(0.2, seconds), cold)]
    assert not wrong, "\n".join(wrong)
