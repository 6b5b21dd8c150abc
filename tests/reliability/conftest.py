"""The warm process and the five jobs, made once."""

import shutil
import sys

import pytest

from tests.reliability.jobs import make_inputs, make_jobs
from tests.reliability.kills import build_faults, unbroken
from tests.reliability.warm import warm

FROM = {"pairs.save": ("rlhf_dpo_generate_save", "o.save"), "pairs.save.json": ("rlhf_dpo_generate_save", "o.save.json"),
        "adapter.safetensors": ("train", "run/rwkv-final.safetensors")}


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("reliability")


@pytest.fixture(scope="session")
def run(workplace):
    """Runs scripts, with faults where a test asks for them."""
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("needs Linux and a C compiler, cc, to put faults between a process and its files")
    with warm(workplace, build_faults(workplace)) as run:
        yield run


@pytest.fixture(scope="session")
def inputs(run, workplace):
    """base.pth, pairs.csv, and what the scripts make of them: pairs.save, adapter.safetensors."""
    folder = workplace / "inputs"
    folder.mkdir()
    jobs = make_jobs(make_inputs(folder), workplace / "out")
    for name, (script, made) in FROM.items():
        if not (jobs[script].out / made).exists():
            done = run(script, jobs[script].words())
            assert done.status == 0, done.err
        shutil.copy(jobs[script].out / made, folder / name)
    return folder


@pytest.fixture(scope="session")
def jobs(inputs, workplace):
    return make_jobs(inputs, workplace / "out")


@pytest.fixture(scope="session")
def references(run, jobs, workplace):
    return {script: unbroken(run, job, workplace) for script, job in jobs.items()}
