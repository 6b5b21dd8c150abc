"""Processes that are forked from one that has imported what takes long: torch above all. None of src is in it."""

import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

LATE = 124  # the exit status of a child that was ended at its limit


class Replaced(MetaPathFinder, SourceFileLoader):
    """Gives a module another source than its file has."""

    def __init__(self, path: Path, source: str):
        super().__init__(".".join(path.with_suffix("").parts), str(path.resolve()))
        self.source = source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def forked(work: Callable[[], int], limit: float, output: Path) -> int:
    """Exit status of a child that does the work, silent but for `output`; it and what it started end at `limit` seconds."""
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 3
        try:
            os.setsid()
            with output.open("wb") as file, open(os.devnull) as nothing:
                for number, stream in ((0, nothing), (1, file), (2, file)):
                    os.dup2(stream.fileno(), number)
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end, ended = time.monotonic() + limit, 0
    try:
        while time.monotonic() < end and not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if ended else LATE


def run_tests(tests: Iterable[str], plugins: tuple[Any, ...] = (), *, first: bool = True) -> int:
    """pytest's exit status; with `first` it ends at the first test that fails."""
    with tempfile.TemporaryDirectory() as folder:
        return int(pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/tests",
                                *(["-x"] if first else []), *tests], plugins=list(plugins)))


class Watch:
    """A plugin of pytest: how long each test takes, and which lines of which files it runs."""

    def __init__(self, files: Iterable[Path]):
        import coverage

        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.uses: dict[str, list[str]] = {}  # of each test the fixtures that it shares with others
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=[str(path.resolve()) for path in files])
        self.coverage.start()
        self.context = ""

    def told(self, files: Iterable[Path]) -> dict[str, Any]:
        """{"seconds": by test, "failed": tests, "lines": by file and line the tests that run it, "modules": all imported}."""
        self.coverage.stop()
        data, users = self.coverage.get_data(), {test: [test] for test in self.seconds}
        for test, fixtures in self.uses.items():
            for fixture in fixtures:
                users.setdefault(fixture, []).append(test)
        lines = {str(path): {line: sorted({test for context in contexts for test in users.get(context, ())})
                             for line, contexts in data.contexts_by_lineno(str(path.resolve())).items()} for path in files}
        ours = ("src", "tests", "__", "conftest")
        return {"seconds": self.seconds, "failed": self.failed, "lines": lines,
                "modules": [name for name in sys.modules if not name.startswith(ours)]}

    def _switch(self, context: str) -> str:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.uses[item.nodeid] = [f"fixture {one.baseid}::{one.argname}" for some in item._fixtureinfo.name2fixturedefs.values()
                                  for one in some if one.scope != "function"]
        before, start = self._switch(item.nodeid), time.monotonic()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.monotonic() - start
            self._switch(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        before = self._switch(f"fixture {fixturedef.baseid}::{fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def measured(tests: Iterable[str], files: list[Path], limit: float) -> dict[str, Any]:
    """What `Watch` tells of all tests in these files and folders."""
    with tempfile.TemporaryDirectory() as folder:
        answer, output = Path(folder, "answer"), Path(folder, "output")

        def work() -> int:
            watch = Watch(files)
            status = run_tests(tests, (watch,), first=False)
            answer.write_text(json.dumps(watch.told(files)))
            return status

        status = forked(work, limit, output)
        if not answer.exists():
            raise SystemExit(f"error: the tests did not come to an end (status {status}):\n{output.read_text()[-2000:]}")
        return json.loads(answer.read_text())


def import_all(modules: Iterable[str]) -> None:
    """Of what the tests import, all that can be imported by its name."""
    for name in modules:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
