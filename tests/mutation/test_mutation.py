"""The tool itself: which faults it makes, and that it tells those which tests find from those which none does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mutmut", reason="requirements-mutants.txt is not installed")

from tests.mutation.__main__ import FOR_ALL
from tests.mutation.mutants import mutants_of

ROOT = Path(__file__).parents[2]
SOURCE = '''"""Some numbers."""

from functools import cache

LIMIT = 3


@cache
def grown(x: int, by: int = 1) -> int:
    if x > LIMIT:
        raise ValueError(f"{x} is over {LIMIT + 1}: take less")
    return x + by


def unused(x):
    print(x)
    return "a name", "this is prose", f"{x} of them"
'''
TEST = "import pytest\n\nfrom src.room.sums import grown\n\n\n@pytest.mark.parametrize('x', [1, 3])\ndef test_grown(x):\n" \
       "    assert grown(x) == x + 1\n"


@pytest.fixture
def project(tmp_path):
    """A project of one file, with one test, laid out as this one."""
    for name, text in {"src/room/sums.py": SOURCE, "tests/room/test_sums.py": TEST, **dict.fromkeys(FOR_ALL, ""),
                       "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for folder in ("src", "src/room"):
        (tmp_path / folder / "__init__.py").touch()
    return tmp_path


def test_one_change_each_in_decorated_functions_and_constants_too_but_in_no_message(project):
    changes = [mutant.change for mutant in mutants_of(project / "src/room/sums.py")]
    for change in ("LIMIT = 3 -> LIMIT = 4", "if x > LIMIT: -> if x >= LIMIT:", "return x + by -> return x - by",
                   "if x > LIMIT: -> if (x > LIMIT) and False:", "print(x) -> pass",
                   'return "a name", "this is prose", f"{x} of them" -> return "XXa nameXX", "this is prose", f"{x} of them"',
                   "def grown(x: int, by: int = 1) -> int: -> def grown(x: int, by: int = 2) -> int:"):
        assert changes.count(change) == 1
    untouched = ("take less", "cache", '"""', "proseXX")
    assert not [change for change in changes for part in untouched if part in change]


def test_what_survives_is_told(project):
    environment = os.environ | {"PYTHONPATH": f"{project}:{ROOT}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "tests.mutation", "src/room/sums.py"], cwd=project, env=environment,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert (project / "src/room/sums.py").read_text() == SOURCE
    outcomes = {one["change"]: one["outcome"]
                for one in json.loads((project / ".mutants/src.room.sums.json").read_text())}
    assert outcomes["return x + by -> return x - by"] == outcomes["if x > LIMIT: -> if x >= LIMIT:"] == "killed"
    assert outcomes["LIMIT = 3 -> LIMIT = 4"] == outcomes["if x > LIMIT: -> if (x > LIMIT) and False:"] == "survived"
    assert outcomes["print(x) -> pass"] == "untested"
    assert "survived src/room/sums.py:5: LIMIT = 3 -> LIMIT = 4" in run.stdout
