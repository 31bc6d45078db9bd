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

from moe.ablation.cells import Cell, spelled
from moe.config import ConfigError, dump_config, flat_config, parse_config
from moe.runs.resuming import sets_results
from moe.runs.run_folder import RunFolder


class AblationFolder:
    """Paths of one ablation.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.plan = path / "plan.json"  # every cell that was ever planned here, with its seeds
        self.results = path / "results.jsonl"  # a line per planned run, finished or not

    def config(self, cell: str) -> Path:
        """Of a cell; run.* is set for each run."""
        return self.path / "configs" / f"{cell}.yaml"

    def run(self, cell: str, seed: int) -> RunFolder:
        """An ordinary run of train.py."""
        return RunFolder(self.path / "runs" / cell / f"seed-{seed}")

    def log(self, cell: str, seed: int) -> Path:
        """What the run printed."""
        return self.path / "logs" / f"{cell},seed={seed}.log"

    def check(self, cells: Sequence[Cell]) -> None:
        """Look whether these cells may be trained here, writing nothing.

        Raises:
            ConfigError: the path is no folder, or a cell of the same name has another configuration there.
        """
        parent = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not parent.is_dir():
            raise ConfigError("--out", f"{parent} is a file; choose a folder")
        before = self._read_plan()["cells"]
        for cell in cells:
            if cell.name in before:
                old = flat_config(parse_config(before[cell.name]["config"]))
                for key, value in flat_config(cell.config).items():
                    if sets_results(key) and not key.startswith("run.") and old[key] != value:
                        problem = f"{cell.name} has {key} {spelled(old[key])} there, not {spelled(value)}"
                        raise ConfigError("--out", f"{self.path}: {problem}; choose another folder")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other ablations out of the folder, which is made where it is missing.

        Raises:
            ConfigError: one is running there, or the file system refuses.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    "--out", f"another ablation is running in {self.path}; wait for it"
                ) from None
            yield
        finally:
            os.close(lock)

    def add_plan(self, cells: Sequence[Cell], seeds: Sequence[int], command: Mapping[str, Any]) -> None:
        """Add cells with these seeds to the plan, with the part of the command line that led to them.

        Raises:
            ConfigError: the file system refuses.
        """
        before = self._read_plan()["cells"]
        planned = {
            cell.name: {
                "settings": dict(cell.settings),
                "mismatch": cell.mismatch,
                "is_dense": cell.is_dense,
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
        """Write `results.jsonl` anew, in the order of the plan.

        Args:
            exit_codes: of runs of this command that ended, by cell and seed; those of earlier commands are
                kept while their runs are not finished.
        """
        known = {(line["cell"], line["seed"]): line.get("exit_code") for line in self._read_results()}
        lines = []
        for cell, planned in self._read_plan()["cells"].items():
            for seed in planned["seeds"]:
                summary = self.run(cell, seed).summary
                line = {"cell": cell, "seed": seed, "finished": summary.exists()}
                if line["finished"]:
                    line |= json.loads(summary.read_text())
                else:
                    line["exit_code"] = exit_codes.get((cell, seed), known.get((cell, seed)))
                lines.append(line)
        write_whole(self.results, "".join(json.dumps(line) + "\n" for line in lines))

    def unfinished(self) -> list[str]:
        """Names of planned runs that are not finished, by the record; none where there is no record."""
        return [
            f"{line['cell']} seed {line['seed']}"
            + (f" (exit code {line['exit_code']})" if line.get("exit_code") else "")
            for line in self._read_results()
            if not line["finished"]
        ]

    def is_quick(self) -> bool:
        """Whether the runs were cut short by --quick."""
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
            raise ConfigError("--out", f"{self.plan} is not JSON; remove it to plan anew") from None
        for cell in plan["cells"].values():
            cell.setdefault("seeds", plan.get("seeds"))  # the first plans had one list for all cells
        return plan


def write_whole(path: Path, text: str) -> None:
    """Write a file in one piece: who reads it meanwhile finds the old one."""
    scratch = path.with_name(f"{path.name}.partial")
    scratch.write_text(text)
    scratch.replace(path)
