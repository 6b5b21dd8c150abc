"""`make gpu` with checks of our own: each has its limit, what is done is written, what cannot run is said."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu" / "checks.py"


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """The script as a module, with none of its checks, its files in a temporary folder, on a machine said to have a GPU."""
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("checks", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(sys.modules["results"], "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "gpu_found", lambda: True)
    monkeypatch.setattr(module, "card", lambda: "A100")
    for group in ("FIRST", "TOGETHER", "ALONE"):
        monkeypatch.setattr(module, group, [])
    return module


def run(checks, monkeypatch, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["checks.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        checks.main()
    path = checks.LOGS.parent / "results" / "checks_gpu.json"
    return int(stop.value.code), json.loads(path.read_text())["checks"] if path.exists() else {}


def test_a_check_that_hangs_costs_itself_alone(checks, monkeypatch, capsys):
    # A child of the shell's own would outlive the shell.
    checks.TOGETHER += [checks.Check("hangs", ["sh", "-c", "echo begun; sleep 60; true"], 2), checks.Check("works", ["true"], 9)]
    checks.ALONE += [checks.Check("fails", ["sh", "-c", "echo the reason; exit 3"], 9),
                     checks.Check("missing", ["no-such-tool"], 9)]
    started = time.monotonic()
    code, found = run(checks, monkeypatch)
    assert code == 1 and time.monotonic() - started < 30
    assert {name: check["result"] for name, check in found.items()} == {
        "hangs": "stopped after 2 s", "works": "passed", "fails": "failed (3)", "missing": "not run: no no-such-tool here"}
    assert found["hangs"]["last_line"] == "begun" and "the reason" in capsys.readouterr().out


def test_some_checks_again_leave_the_others_results(checks, monkeypatch):
    checks.ALONE += [checks.Check("one", ["true"], 9), checks.Check("two", ["true"], 9)]
    assert run(checks, monkeypatch)[0] == 0
    checks.ALONE[1] = checks.Check("two", ["false"], 9)
    code, found = run(checks, monkeypatch, "--only", "two")
    assert code == 1 and (found["one"]["result"], found["two"]["result"]) == ("passed", "failed (1)")
    monkeypatch.setattr(checks, "card", lambda: "H100")
    assert run(checks, monkeypatch, "--only", "one")[1].keys() == {"one"}


def test_nothing_else_runs_where_the_kernels_cannot_be_built(checks, monkeypatch):
    checks.FIRST += [checks.Check("build", ["false"], 9)]
    checks.ALONE += [checks.Check("one", ["true"], 9)]
    assert run(checks, monkeypatch)[1].keys() == {"build"}


def test_without_a_gpu_one_line_says_so(checks, monkeypatch, capsys):
    monkeypatch.setattr(checks, "gpu_found", lambda: False)
    assert run(checks, monkeypatch) == (2, {})
    assert capsys.readouterr().err.splitlines()[-1] == (
        "checks.py: error: torch finds no GPU here, and nothing else is checked by this; make test checks the rest")
