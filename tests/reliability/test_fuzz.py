"""Thousands of damaged files through every reader."""

import shutil
from pathlib import Path

import pytest

from src import kernels
from tests.reliability.fuzz import fuzz, in_words
from tests.reliability.readers import NAMES, RUN_NAMES, make_readers

INPUTS, RUNS, FEW = 2000, 300, 25


@pytest.fixture(scope="session")
def readers(tmp_path_factory):
    kernels.missing("cpu")
    return make_readers(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def try_reader(readers, tmp_path_factory):
    """`try_reader(name, inputs)`: the findings, in words."""

    def try_reader(name: str, inputs: int) -> str:
        # The folder in which readers that are whole runs look for their files.
        folder = Path(tmp_path_factory.getbasetemp() / "fuzz0")
        shutil.rmtree(folder / "input", ignore_errors=True)
        return in_words(fuzz(readers[name], range(inputs), folder))

    return try_reader


def test_every_reader_is_tried(readers):
    assert set(readers) == {*NAMES, *RUN_NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_few_damaged_files(try_reader, name):
    assert not (found := try_reader(name, FEW)), found


@pytest.mark.slow
@pytest.mark.parametrize("name", (*NAMES, *RUN_NAMES))
def test_damaged_files(try_reader, name):
    assert not (found := try_reader(name, RUNS if name in RUN_NAMES else INPUTS)), found
