"""The folder of an ablation: its plan, the results of its runs, and where they are.

plan.json  configs/CELL.yaml  runs/CELL/seed-N/  logs/CELL,seed=N.log  results.jsonl  and the report
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe.ablation.cells import Cell, StepTime, spelled
from moe.config import ConfigError, dump_config, flat_config, parse_config
from moe.runs.resuming import sets_results
from moe.runs.run_folder import RunFolder


class AblationFolder:
    """Paths and records of one ablation."""

    def __init__(self, path: Path):
        self.path = path
        self.plan = path / "plan.json"  # all cells ever planned here, with their seeds
        self.results = path / "results.jsonl"  # one line per planned run, finished or not

    def config(self, cell: str) -> Path:
        """Configuration of a cell; the command line of each run sets `run.*`."""
        return self.path / "configs" / f"{cell}.yaml"

    def run(self, cell: str, seed: int) -> RunFolder:
        """Folder of a run, which is an ordinary run of train.py."""
        return RunFolder(self.path / "runs" / cell / f"seed-{seed}")

    def log(self, cell: str, seed: int) -> Path:
        """Output of a run."""
        return self.path / "logs" / f"{cell},seed={seed}.log"

    def check(self, cells: Sequence[Cell]) -> None:
        """Check that these cells can be trained here, without writing anything.

        Raises:
            ConfigError: the path is not a folder, or a planned cell of the same name has other settings.
        """
        parent = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not parent.is_dir():
            raise ConfigError("--out", f"{parent} is a file; choose a folder")
        planned = self._read_plan()["cells"]
        for cell in (cell for cell in cells if cell.name in planned):
            old = flat_config(parse_config(planned[cell.name]["config"]))
            for key, value in flat_config(cell.config).items():
                if sets_results(key, cell.config) and not key.startswith("run.") and old[key] != value:
                    problem = f"{cell.name} has {key} {spelled(old[key])} there, not {spelled(value)}"
                    raise ConfigError("--out", f"{self.path}: {problem}; choose another folder")

    def check_race(self, conditions: Mapping[str, Any] | None) -> None:
        """Check that the plan, if there is one, is that of a race under these conditions, or of none.

        Raises:
            ConfigError: it is not.
        """
        plan = self._read_plan()
        there = plan.get("race")
        if plan["cells"] and (there is None) != (conditions is None):
            kind = "no race, but equal steps" if there is None else "a race by the clock"
            raise ConfigError("--hold", f"{self.path} was planned as {kind}; choose another folder")
        for key, value in (conditions or {}).items():
            if there and there.get(key) != value:
                problem = f"{value!r}, but step times in {self.path} were measured with {there.get(key)!r}"
                raise ConfigError(key, f"{problem}; use that, or choose another folder")

    def step_times(self) -> dict[str, StepTime]:
        """The step times of the cells of a race, by the names of the cells."""
        cells = self._read_plan()["cells"].items()
        return {name: StepTime(**cell["step_time"]) for name, cell in cells if cell.get("step_time")}

    def planned_as(self, cell: Cell) -> str | None:
        """The name of the planned cell with this name, or else with these experts; None if there is none."""
        planned, moe = self._read_plan()["cells"], cell.config.moe.model_dump(mode="json")
        alike = [name for name, other in planned.items() if other["config"]["moe"] == moe]
        return cell.name if cell.name in planned else next(iter(alike), None)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if needed, and keep other ablations out of it.

        Raises:
            ConfigError: another ablation is running there, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            if not try_lock(lock):
                raise ConfigError("--out", f"another ablation is running in {self.path}; wait for it")
            yield
        finally:
            os.close(lock)

    def add_plan(self, cells: Sequence[Cell], seeds: Sequence[int], command: Mapping[str, Any]) -> None:
        """Add cells with these seeds to the plan, and record the options of the command that led to them.

        Raises:
            ConfigError: the folder cannot be written.
        """
        before = self._read_plan()["cells"]
        planned = {
            cell.name: {
                "settings": dict(cell.settings),
                "mismatch": cell.mismatch,
                "is_dense": cell.is_dense,
                "step_time": cell.step_time and cell.step_time._asdict(),
                "seeds": sorted({*before.get(cell.name, {"seeds": []})["seeds"], *seeds}),
                "config": cell.config.model_dump(mode="json"),
            }
            for cell in cells
        }
        try:
            for folder in ("configs", "logs"):
                (self.path / folder).mkdir(exist_ok=True)
            for cell in cells:
                self.config(cell.name).write_text(dump_config(cell.config))
            write_whole(self.plan, json.dumps({**command, "cells": before | planned}, indent=1))
        except OSError as error:
            raise self._cannot_write(error) from None

    def write_results(self, exit_codes: Mapping[tuple[str, int], int]) -> None:
        """Rewrite `results.jsonl`; exit codes by cell and seed are added to those recorded before."""
        known = {(line["cell"], line["seed"]): line.get("exit_code") for line in self._read_results()}
        text = ""
        for cell, planned in self._read_plan()["cells"].items():
            for seed in planned["seeds"]:
                summary = self.run(cell, seed).summary
                finished = summary.exists()
                exit_code = {"exit_code": exit_codes.get((cell, seed), known.get((cell, seed)))}
                result = json.loads(summary.read_text()) if finished else exit_code
                text += json.dumps({"cell": cell, "seed": seed, "finished": finished} | result) + "\n"
        write_whole(self.results, text)

    def unfinished(self) -> list[str]:
        """Names of the runs that `results.jsonl` records as not finished."""
        return [
            f"{line['cell']} seed {line['seed']}"
            + (f" (exit code {line['exit_code']})" if line.get("exit_code") else "")
            for line in self._read_results()
            if not line["finished"]
        ]

    def is_quick(self) -> bool:
        """Whether the runs were shortened by --quick."""
        return bool(self._read_plan().get("quick"))

    def _read_results(self) -> list[dict[str, Any]]:
        text = self.results.read_text() if self.results.exists() else ""
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError:
            raise ConfigError("DIR", f"{self.results} is not JSON lines; remove it") from None

    def _cannot_write(self, error: OSError) -> ConfigError:
        return ConfigError("--out", f"cannot write {self.path} ({error.strerror}); choose another")

    def _read_plan(self) -> dict[str, Any]:
        if not self.plan.exists():
            return {"cells": {}}
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError("--out", f"{self.plan} is not JSON; remove it to start a new plan") from None
        for cell in plan["cells"].values():
            cell.setdefault("seeds", plan.get("seeds"))  # early plans had one list of seeds for all cells
        return plan


def try_lock(file: int) -> bool:
    """Lock an open file without waiting; False if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: a reader finds either the old content or the new."""
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(text)
    scratch.replace(path)
