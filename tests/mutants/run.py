"""Plant bugs one at a time, and see whether a test fails.

    python -m tests.mutants.run record        which tests run which lines: the suite once, under coverage
    python -m tests.mutants.run [NAME ...]    plant all bugs, or these; what has a result is not run again

Each bug is planted in a copy of the tree. There the tests that run the changed lines are run, fast ones
first, until one fails. All is kept in `.mutants/`; remove `results.jsonl` there to start again.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from moe.tables import align
from tests.mutants.coverage_map import CoverageMap, record
from tests.mutants.mutants import Mutant, all_mutants
from tests.support.paths import ROOT

WORK = ROOT / ".mutants"
MAP, RESULTS = WORK / "map.json", WORK / "results.jsonl"


def main() -> None:
    """Record, or plant bugs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="record | NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="bugs side by side")
    options = parser.parse_args()
    if options.names == ["record"]:
        record(MAP)
        return
    mutants = [mutant for mutant in all_mutants() if not options.names or mutant.name in options.names]
    if not MAP.exists():
        sys.exit("first: python -m tests.mutants.run record")
    found = _plant_all(mutants, CoverageMap(MAP), options.jobs)
    print(align(list(_rows(mutants, found))))
    caught = sum(result["outcome"] != "survived" for result in found)
    print(f"{caught} of {len(found)} caught, {caught / max(1, len(found)):.0%}")


def _plant_all(mutants: list[Mutant], coverage: CoverageMap, jobs: int) -> list[dict[str, Any]]:
    """The results in the order of the mutants, those of earlier calls included."""
    done = {json.dumps(result["mutant"], sort_keys=True): result for result in _read_results()}
    keys = [json.dumps(asdict(mutant), sort_keys=True) for mutant in mutants]
    copies: SimpleQueue[Path] = SimpleQueue()
    for _ in range(jobs):
        copies.put(_copy_of_tree())

    def plant(key: str, mutant: Mutant) -> dict[str, Any]:
        if key in done:
            return done[key]
        copy = copies.get()
        try:
            result = _plant(mutant, coverage, copy)
        finally:
            copies.put(copy)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{mutant.area}/{mutant.name}: {result['outcome']} after {result['seconds']:.0f} s", flush=True)
        return result

    try:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(plant, keys, mutants))
    finally:
        while not copies.empty():
            shutil.rmtree(copies.get(), ignore_errors=True)


def _read_results() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def _copy_of_tree() -> Path:
    """Of all files that git does not ignore."""
    copy = Path(tempfile.mkdtemp(prefix="mutant-"))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


def _plant(mutant: Mutant, coverage: CoverageMap, copy: Path) -> dict[str, Any]:
    """Plant one bug in the copy, run its tests, and take it out again."""
    tests = coverage.tests_of(mutant.file, mutant.lines(copy))
    original = (copy / mutant.file).read_text(encoding="utf-8")
    mutant.apply(copy)
    started = time.monotonic()
    try:
        outcome, by = _run_tests(
            tests, copy, timeout_s=600 + 2 * sum(coverage.seconds[test] for test in tests)
        )
    finally:
        (copy / mutant.file).write_text(original, encoding="utf-8")
    seconds = time.monotonic() - started
    return {"mutant": asdict(mutant), "outcome": outcome, "by": by, "tests": len(tests), "seconds": seconds}


def _run_tests(tests: list[str], copy: Path, timeout_s: float) -> tuple[str, str]:
    """Whether one of the tests fails (caught), hangs (timeout) or none does (survived), and which."""
    if not tests:
        return "survived", "no test runs these lines"
    arguments = copy / ".tests-of-mutant"
    arguments.write_text("\n".join(tests), encoding="utf-8")
    # Each copy of the tree before the installed one, for the processes that tests start as well.
    environment = os.environ | {"PYTHONPATH": str(copy), "MUTANTS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, f"@{arguments}"]
    process = subprocess.Popen(
        command, cwd=copy, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return "timeout", ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode == 0:
        return "survived", ""
    if process.returncode not in (1, 2):  # a test failed, or could not be imported
        raise RuntimeError(f"pytest ended with {process.returncode}: {printed[-1000:]}")
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
    return "caught", first.group(1) if first else printed[-300:]


def _rows(mutants: list[Mutant], found: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["area", "bug", "outcome", "seconds", "tests", "first test that failed"]]
    for mutant, result in zip(mutants, found, strict=True):
        cells = [result["outcome"], f"{result['seconds']:.0f}", str(result["tests"]), result["by"]]
        rows.append([mutant.area, mutant.name, *cells])
    return rows


if __name__ == "__main__":
    main()
