"""Which tests run which lines, and how long they take; recorded once."""

import ast
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from multiprocessing import forkserver
from pathlib import Path

from tests.support.paths import ROOT

_SOURCES = ("moe", "scripts", "train.py")
_CONFIG = ROOT / "tests/mutants/coverage.ini"


class CoverageMap:
    """What `record` has written.

    Args:
        path: a JSON file, `{"seconds": {test: s}, "lines": {file: {line: [place of a test in seconds]}}}`.
    """

    def __init__(self, path: Path):
        content = json.loads(path.read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = content["seconds"]
        self._tests, self._lines = list(self.seconds), content["lines"]

    def tests_of(self, file: str, lines: range) -> list[str]:
        """The tests that run any of these lines, fast ones first.

        Lines outside of functions run when the file is imported, before any test: they belong to all tests
        that run the file.
        """
        of_file: dict[str, list[int]] = self._lines.get(file, {})
        within_functions = _lines_of_functions(ROOT / file).issuperset(lines)
        of_lines = (of_file.get(str(line), []) for line in lines) if within_functions else of_file.values()
        places = {place for tests in of_lines for place in tests}
        return sorted((self._tests[place] for place in places), key=lambda test: self.seconds[test])


def _lines_of_functions(path: Path) -> set[int]:
    """The numbers of the lines in the bodies of functions."""
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    )
    return {
        line
        for function in functions
        for line in range(function.body[0].lineno, (function.end_lineno or function.lineno) + 1)
    }


def record(path: Path) -> None:
    """Run the whole suite under coverage, and write the map, of the tests that pass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, junit = path.with_name("coverage.db"), path.with_name("junit.xml")
    command = [sys.executable, "-m", "pytest", "-q", "--cov-context=test", f"--junitxml={junit}"]
    command += [f"--cov={source.removesuffix('.py')}" for source in _SOURCES]
    command += ["--cov-report=", f"--cov-config={_CONFIG}", "-p", __name__]
    environment = os.environ | {"COVERAGE_FILE": str(data), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment)
    seconds = _seconds(junit)
    path.write_text(json.dumps({"seconds": seconds, "lines": _lines(data, list(seconds))}), encoding="utf-8")


def _lines(data: Path, tests: list[str]) -> dict[str, dict[int, list[int]]]:
    """Of each file, the places in `tests` of those that run a line."""
    import coverage

    measured = coverage.CoverageData(no_disk=True)
    for part in data.parent.glob(f"{data.name}*"):  # processes that end late leave files of their own
        content = coverage.CoverageData(str(part))
        content.read()
        measured.update(content)
    places = {test: place for place, test in enumerate(tests)}
    of_module: dict[str, list[str]] = {}
    for test in tests:
        of_module.setdefault(test.partition("::")[0], []).append(test)
    lines = {}
    for file in filter(lambda name: name.startswith(f"{ROOT}/"), sorted(measured.measured_files())):
        of_file = lines[file.removeprefix(f"{ROOT}/")] = {}
        for line, contexts in measured.contexts_by_lineno(file).items():
            names = {test for context in contexts for test in _tests_of(context, of_module)}
            if found := sorted(places[name] for name in names & places.keys()):
                of_file[line] = found
    return lines


def pytest_runtest_setup() -> None:
    """Let coverage start in every process that a test starts; `record` makes this module a pytest plugin.

    Processes are forked from one that has the environment, and so the name of the test, of when it started.
    """
    os.environ["COVERAGE_PROCESS_START"] = str(_CONFIG)
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]


def _tests_of(context: str, of_module: dict[str, list[str]]) -> list[str]:
    """The tests of `tests/x.py::test|call` (pytest-cov) or `tests/x.py::test (call)` (PYTEST_CURRENT_TEST).

    What a setup runs may be a fixture that all tests of the module share.
    """
    match = re.fullmatch(r"(.*?)(?:\|| \()(setup|run|call|teardown)\)?", context, re.DOTALL)
    if match is None:
        return []
    test = _without_group(match[1])
    return of_module.get(test.partition("::")[0], []) if match[2] == "setup" else [test]


def _without_group(test: str) -> str:
    """pytest-xdist puts `@group` behind the names of grouped tests; without workers they go without."""
    return re.sub(r"@\w+$", "", test)


def _seconds(junit: Path) -> dict[str, float]:
    """How long each test took that passed; tests of one group share a fixture, which any of them may make."""
    seconds: dict[str, float] = {}
    slowest: dict[str, float] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            test = f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"
            assert str(ROOT) not in test, f"{test} has another name in a copy of the tree"
            seconds[test] = float(case.attrib["time"])
            slowest[_group(test)] = max(seconds[test], slowest.get(_group(test), 0.0))
    return {_without_group(test): slowest[_group(test)] for test in seconds}


def _group(test: str) -> str:
    """What `_without_group` removes; a test without a group is its own."""
    return test.removeprefix(_without_group(test)) or test
