"""Which tests run which lines, and how long they take; recorded once."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

from tests.support.paths import ROOT

_SOURCES = ("moe", "scripts", "train.py")


class CoverageMap:
    """What `record` has written.

    Args:
        path: a JSON file, `{"seconds": {test: s}, "lines": {file: {line: [place of a test in seconds]}}}`.
    """

    def __init__(self, path: Path):
        content = json.loads(path.read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = content["seconds"]
        self._tests, self._lines = list(self.seconds), content["lines"]

    def tests_of(self, file: str, lines: Iterable[int]) -> list[str]:
        """The tests that run any of these lines, fast ones first."""
        of_file = self._lines.get(file, {})
        places = {place for line in lines for place in of_file.get(str(line), [])}
        return sorted((self._tests[place] for place in places), key=lambda test: self.seconds[test])


def record(path: Path) -> None:
    """Run the whole suite under coverage, and write the map.

    Raises:
        RuntimeError: a test fails, so nothing can be said about planted bugs.
    """
    import coverage

    path.parent.mkdir(parents=True, exist_ok=True)
    data, junit = path.with_name("coverage.db"), path.with_name("junit.xml")
    command = [sys.executable, "-m", "pytest", "-q", "--cov-context=test", f"--junitxml={junit}"]
    command += [f"--cov={source.removesuffix('.py')}" for source in _SOURCES]
    command += ["--cov-report=", f"--cov-config={ROOT / 'tests/mutants/coverage.ini'}"]
    environment = os.environ | {"COVERAGE_FILE": str(data), "PYTHONPATH": str(ROOT)}
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise RuntimeError("the suite has to pass before bugs are planted")
    seconds = _seconds(junit)
    places = {test: place for place, test in enumerate(seconds)}
    measured, lines = coverage.CoverageData(str(data)), {}
    measured.read()
    for file in sorted(measured.measured_files()):
        if not file.startswith(f"{ROOT}/"):
            continue
        of_file = {}
        for line, contexts in measured.contexts_by_lineno(file).items():
            tests = {_test_of(context) for context in contexts} & places.keys()
            if tests:
                of_file[line] = sorted(places[test] for test in tests)
        lines[file.removeprefix(f"{ROOT}/")] = of_file
    path.write_text(json.dumps({"seconds": seconds, "lines": lines}), encoding="utf-8")


def _test_of(context: str) -> str:
    """`tests/x.py::test|call` of pytest-cov, or `tests/x.py::test (call)` of PYTEST_CURRENT_TEST."""
    return re.sub(r"(\|\w+| \(\w+\))$", "", context)


def _seconds(junit: Path) -> dict[str, float]:
    cases = ElementTree.parse(junit).iter("testcase")
    return {
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(case.attrib["time"])
        for case in cases
    }
