"""`python -m tests.mutation [FILE ...]`: put small faults into files, one at a time, and list those that no test finds.

Each fault is tried in a process forked from one that has torch, on the tests that belong to the file and run what was changed,
the quickest first, up to the first that fails. Nothing on disk is changed. docs/mutants.md tells what the last run gave.
"""

import argparse
import functools
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from tests.mutation.forks import IMPORT, LATE, UNFIT, Exchange, Replaced, forked, import_all, measured, run_tests
from tests.mutation.mutants import Mutant, mutants_of

OUTPUT = Path(".mutants")
ROOMS = ("preference", "training", "adapters")
# Real runs beside the same by hand, which many files have a part in; and the page of flags, which all settings are on.
FOR_ALL = ("tests/training/test_plain_steps.py", "tests/cli/test_document.py")
ENOUGH = 8.0  # seconds of tests beyond which no more are tried on one mutant


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="mutation testing")
    parser.add_argument("files", nargs="*", type=Path, help=f"files of src/ (default: those of {', '.join(ROOMS)})")
    parser.add_argument("--lines", metavar="N", nargs="*", type=int, help="only the mutants in these lines")
    parser.add_argument("--seconds", type=float, default=ENOUGH, help=f"of tests tried on one mutant at most (default: {ENOUGH})")
    options = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    files = options.files or [path for room in ROOMS for path in sorted(Path("src", room).glob("[!_]*.py"))]
    print("file  mutants killed late survived untested  minutes", flush=True)
    for path in files:
        mutate(path, options.lines, options.seconds)


def mutate(path: Path, lines: list[int] | None, enough: float) -> None:
    """Try all of a file's mutants; prints how many there were of each outcome and those that survived, and keeps all of it."""
    known = tests_of(path.parts[1])
    import_all(known["modules"])
    start, kept = time.monotonic(), OUTPUT / f"{'.'.join(path.with_suffix('').parts)}.json"
    mutants = [mutant for mutant in mutants_of(path) if not lines or mutant.line in lines]
    tests = [tests_for(mutant, known["lines"][str(path)], known, enough) for mutant in mutants]
    outcomes: dict[int, dict[str, Any]] = {}

    def told(number: int, status: int, by: str) -> None:
        if status != UNFIT:
            name = "untested" if not tests[number] else {0: "survived", LATE: "late"}.get(status, "killed")
            outcomes[number] = {"outcome": name, "line": mutants[number].line, "change": mutants[number].change, "by": by}
            kept.write_text(json.dumps([one for _, one in sorted(outcomes.items())], indent=1))

    limits = [20 + 10 * sum(known["seconds"].get(test, 0) for test in some) for some in tests]
    exchange(path, mutants, tests, limits, told)
    for number, mutant in enumerate(mutants):
        if number not in outcomes:
            told(number, *imported(path, mutant, tests[number], 20 + limits[number]))
    counts = Counter(one["outcome"] for one in outcomes.values())
    print(path, len(outcomes), *(counts[name] for name in ("killed", "late", "survived", "untested")),
          f"{(time.monotonic() - start) / 60:.1f}")
    for _, one in sorted(outcomes.items()):
        if one["outcome"] in ("survived", "untested"):
            print(f"  {one['outcome']} {path}:{one['line']}: {one['change']}")
    print(end="", flush=True)


def exchange(path: Path, mutants: list[Mutant], tests: list[list[str]], limits: list[float],
             told: Callable[[int, int, str], None]) -> None:
    """Try those mutants that no import runs, in a process that has imported and collected everything."""
    some = {number: (mutant.source, tests[number], limits[number]) for number, mutant in enumerate(mutants)
            if mutant.lines and tests[number] and tests[number][0] != IMPORT}
    files = sorted({test.partition("::")[0] for _, chosen, _ in some.values() for test in chosen})
    # Runs of several files may go on side by side.
    answers, output = (OUTPUT / f"{name}-{path.parts[1]}-{path.stem}" for name in ("answers", "output"))
    answers.write_text("")

    def tell(*answer: Any) -> None:
        with answers.open("a") as file:
            file.write(json.dumps(answer) + "\n")

    if some:
        forked(lambda: run_tests(files, (Exchange(path, some, tell),)), 60 + sum(limits), output)
    for answer in answers.read_text().splitlines():
        told(*json.loads(answer))


def imported(path: Path, mutant: Mutant, tests: list[str], limit: float) -> tuple[int, str]:
    """Exit status and the failed test of a child that imports the mutant."""
    if not tests:
        return 0, ""
    output = OUTPUT / f"output-{path.parts[1]}-{path.stem}"

    def work() -> int:
        sys.meta_path.insert(0, Replaced(path, mutant.source))
        return run_tests([test for test in tests if test != IMPORT])

    status = forked(work, limit, output)
    said = [line for line in output.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return status, "".join(said[-1:])


def tests_for(mutant: Mutant, run: dict[str, list[str]], known: dict[str, Any], enough: float) -> list[str]:
    """Those that run what was changed, as many as `enough` seconds have room for; IMPORT before them where an import does."""
    wanted = range(mutant.lines[0], mutant.lines[1] + 1) if mutant.lines else map(int, run)
    users = {test for line in wanted for test in run.get(str(line), ())} - {*known["failed"]}
    if mutant.lines and IMPORT in users:  # whatever the import has made of it
        users = {test for some in run.values() for test in some} - {*known["failed"]}
    if users == {IMPORT}:  # a file without functions
        users |= known["seconds"].keys() - known["failed"]
    tests = in_order(users - {IMPORT}, known["seconds"])
    totals = accumulate(known["seconds"][test] for test in tests)
    tests = [test for test, total in zip(tests, totals, strict=True) if total < enough] or tests[:1]
    return [IMPORT, *tests] if IMPORT in users and tests else tests


def in_order(tests: set[str], seconds: dict[str, float]) -> list[str]:
    """Quick ones first, and of the many cases of one test some after other tests."""
    nth: Counter[str] = Counter()
    keys = {}
    for test in sorted(tests, key=seconds.__getitem__):
        name = test.partition("[")[0]
        keys[test] = (0.01 + seconds[test]) * (1 + nth[name])
        nth[name] += 1
    return sorted(tests, key=lambda test: (keys[test], test))


@functools.cache
def tests_of(room: str) -> dict[str, Any]:
    """What `measured` tells of a room's tests; kept until some source or test is another."""
    digest = hashlib.sha256(repr(FOR_ALL).encode())
    for path in sorted([*Path("src").rglob("*.py"), *Path("tests").rglob("*.py")]):
        if path.parts[:2] != ("tests", "mutation"):
            digest.update(path.read_bytes())
    kept = OUTPUT / f"{room}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        others = [test for test in FOR_ALL if not test.startswith(f"tests/{room}/")]
        known = measured([f"tests/{room}", *others], sorted(Path("src", room).glob("*.py")), 3600)
        kept.write_text(json.dumps(known))
        for test in known["failed"]:
            print(f"  left out, since it fails without a mutant: {test}", flush=True)
    return json.loads(kept.read_text())


if __name__ == "__main__":
    main()
