"""Processes that are forked from one that has imported what takes long: torch above all. None of src is in it."""

import contextlib
import gc
import importlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

LATE = 124  # the exit status of a child that was ended at its limit
UNFIT = 125  # of one whose functions could not be exchanged
IMPORT = "(import)"  # stands among the tests that run a line, where it runs before them
Functions = dict[str, list[types.FunctionType]]


class Replaced(MetaPathFinder, SourceFileLoader):
    """Gives a module another source than its file has."""

    def __init__(self, path: Path, source: str):
        super().__init__(".".join(path.with_suffix("").parts), str(path.resolve()))
        self.source = source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def forked(work: Callable[[], int], limit: float, output: Path | None = None) -> int:
    """Exit status of a child that does the work; it and what it started end at `limit` seconds. Its output may go to a file."""
    sys.stdout.flush()
    if not (child := os.fork()):
        status = 3
        try:
            os.setsid()
            sys.orig_argv = [sys.executable, "-c", ""]  # a fault may start this program once more, as another process of a run
            signal.alarm(math.ceil(limit) + 1)  # should its parent end before it
            if output is not None:
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
            time.sleep(0.005)
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
        users[""] = [IMPORT]
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


class Exchange:
    """A plugin of pytest: instead of all tests once, some tests for each mutant, in a child where its functions are exchanged.

    What was imported and collected is there already, so that a child costs little more than its tests.

    Args:
        path: the file that the mutants are of. mutants: by number, the file's source, the tests, and their limit in seconds.
        told: gets each mutant's number, the child's exit status (UNFIT: nothing was tried) and the test that failed.
    """

    def __init__(self, path: Path, mutants: dict[int, tuple[str, list[str], float]], told: Callable[[int, int, str], None]):
        self.path, self.mutants, self.told = path.resolve(), mutants, told
        self.failed = ""

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        with tempfile.TemporaryDirectory() as folder:
            failed = Path(folder, "failed")
            functions = functions_of(self.path)
            for number, (source, tests, limit) in self.mutants.items():
                failed.write_text("")
                chosen = [items[test] for test in tests if test in items]
                status = forked(lambda source=source, chosen=chosen: self._try(functions, source, chosen, failed), limit)
                self.told(number, status, failed.read_text())
        return True

    def _try(self, functions: Functions, source: str, items: list[pytest.Item], failed: Path) -> int:
        if not exchange(functions, compile(source, str(self.path), "exec", dont_inherit=True)):
            return UNFIT
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                failed.write_text(self.failed)
                return 1
        return 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid


def functions_of(path: Path) -> Functions:
    """A file's functions, wherever they are held, by qualified name and in the file's order."""
    functions: Functions = {}
    for one in gc.get_objects():
        if type(one) is types.FunctionType and one.__code__.co_filename == str(path):
            functions.setdefault(one.__code__.co_qualname, []).append(one)
    return {name: sorted(some, key=lambda function: function.__code__.co_firstlineno) for name, some in functions.items()}


def exchange(functions: Functions, module: types.CodeType) -> bool:
    """Give functions what another compiled module has for them; False where that can't be."""
    codes: dict[str, list[types.CodeType]] = {}
    _codes_in(module, codes)
    try:
        for name, some in codes.items():
            for old, new in zip(functions.get(name, ()), some, strict=True):
                old.__code__ = new
    except ValueError:  # another number of them, or of names from around them
        return False
    return True


def _codes_in(code: types.CodeType, found: dict[str, list[types.CodeType]]) -> None:
    """The functions' codes of a module and its classes, by qualified name, in the file's order; not those within functions."""
    for one in code.co_consts:
        if isinstance(one, types.CodeType) and "<" not in one.co_qualname:
            if one.co_flags & inspect.CO_NEWLOCALS:
                found.setdefault(one.co_qualname, []).append(one)
            else:  # a class
                _codes_in(one, found)
