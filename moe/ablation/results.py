"""Finished runs, and the cells that they form: runs that differ only in their seed belong to one cell."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.ablation.cells import DENSE_KEYS, spelled
from moe.ablation.statistics import Interval, paired_difference
from moe.accounting.counts import ModelCounts, count_parameters
from moe.config import Config, ConfigError, flat_config, load_config
from moe.runs.metrics_log import read_metrics
from moe.runs.resuming import sets_results
from moe.runs.run_folder import RunFolder

WIDTH = "moe.d_ff_expert"


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class CellResult:
    """Runs that differ only in their seed."""

    label: str  # distinguishes the cell from the others
    runs: Mapping[int, Run]  # by seed
    config: Config  # of the first run
    counts: ModelCounts

    @property
    def is_dense(self) -> bool:
        """Whether the model has no router."""
        return self.config.moe.is_dense

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss by seed, in nats per token."""
        return {seed: run.summary["final_eval_loss"] for seed, run in self.runs.items()}

    @property
    def flops(self) -> int:
        """Forward FLOPs per token."""
        return self.counts.flops_per_token_forward

    @property
    def mean_loss(self) -> float:
        """Final validation loss, mean over seeds."""
        return statistics.mean(self.losses.values())

    @property
    def tokens_per_s(self) -> float:
        """Training speed, median over seeds."""
        return statistics.median(run.summary["tokens_per_s"] for run in self.runs.values())

    def difference_to(self, other: "CellResult") -> Interval | None:
        """Loss minus the loss of another cell, paired by seed; None without a common seed."""
        shared = self.runs.keys() & other.runs.keys()
        return paired_difference(self.losses, other.losses) if shared else None

    def cost(self, key: str) -> float | None:
        """Mean over seeds of a value of `cost` in `summary.json`; None if a run does not know it."""
        values = [run.summary.get("cost", {}).get(key) for run in self.runs.values()]
        return None if None in values else statistics.mean(values)

    def mean(self, key: str) -> float | None:
        """Mean of a metric over the last tenth of its log and over seeds; None if it was not logged."""
        values = []
        for run in self.runs.values():
            logged = [line[key] for line in run.metrics if line.get(key) is not None]
            values += logged[-max(1, len(logged) // 10) :]
        return statistics.mean(values) if values else None


def read_runs(root: Path) -> tuple[list[Run], list[Path]]:
    """Read all finished runs below a folder, one per settings and seed; and the folders of further ones.

    Raises:
        ConfigError: there is no finished run, or a folder is not a complete run of train.py.
    """
    runs: dict[tuple[str, int], Run] = {}
    left_out = []
    for path in sorted(root.rglob("summary.json")):
        run = _read_run(path.parent)
        key = json.dumps(_settings(run.config)), run.config.run.seed
        if runs.setdefault(key, run) is not run:
            left_out.append(path.parent)
    if not runs:
        raise ConfigError("DIR", f"{root} holds no finished run (no summary.json); train some first")
    return list(runs.values()), left_out


def _read_run(path: Path) -> Run:
    folder = RunFolder(path)
    try:
        summary, metrics = json.loads(folder.summary.read_text()), read_metrics(folder.metrics)
    except (OSError, ValueError):
        summary, metrics = None, []
    needed = {"final_eval_loss", "final_bits_per_byte", "tokens", "tokens_per_s"}
    if not isinstance(summary, dict) or not needed <= summary.keys() or not metrics:
        raise ConfigError("DIR", f"{path} has a summary.json, but not a complete run of train.py; remove it")
    return Run(path, load_config(folder.config), summary, metrics)


def _settings(config: Config) -> dict[str, Any]:
    """All settings that affect results, except the seed and, for a dense model, the routing."""
    return {
        key: value
        for key, value in flat_config(config).items()
        if sets_results(key)
        and not key.startswith("run.")
        and (not config.moe.is_dense or not key.startswith("moe.") or key in DENSE_KEYS)
    }


def cells_of(runs: Sequence[Run]) -> list[CellResult]:
    """Group runs into cells, dense cells first, then by total parameters."""
    groups = group_runs(runs, lambda _: True)
    cells = []
    for label, group in zip(_labels(groups), groups, strict=True):
        runs_by_seed, config = {run.config.run.seed: run for run in group}, group[0].config
        cells.append(CellResult(label, runs_by_seed, config, count_parameters(config)))
    return sorted(cells, key=lambda cell: (not cell.is_dense, cell.counts.total, cell.label))


def group_runs(runs: Sequence[Run], is_compared: Callable[[str], bool]) -> list[list[Run]]:
    """Group runs by the settings whose keys satisfy `is_compared`. The seed is ignored."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in _settings(run.config).items() if is_compared(key)}
        groups.setdefault(json.dumps(settings), []).append(run)
    return list(groups.values())


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs differ."""
    settings = [_settings(run.config) for run in runs]
    keys = settings[0] if settings else ()
    return [key for key in keys if len({spelled(some.get(key)) for some in settings}) > 1]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Labels of cells: the folder names of an ablation if these are unique, else the differing settings."""
    firsts = [group[0] for group in groups]
    folders = [{run.folder.parent.name for run in group} for group in groups]
    names = [min(some) for some in folders]
    by_ablation = all(re.fullmatch(r"seed-\d+", run.folder.name) for group in groups for run in group)
    if by_ablation and all(len(some) == 1 for some in folders) and len(set(names)) == len(names):
        return [
            f"{name} (dense)" if run.config.moe.is_dense and not name.startswith("dense") else name
            for name, run in zip(names, firsts, strict=True)
        ]
    labels: dict[Run, str] = {}
    for is_dense in (False, True):
        alike = [run for run in firsts if run.config.moe.is_dense == is_dense]
        keys = differing_keys(alike)
        for wanted in ([key for key in keys if key != WIDTH], keys):  # include the width only if needed
            names = [_label(run, wanted) for run in alike]
            if len(set(names)) == len(names):
                break
        labels |= zip(alike, names, strict=True)
    return [labels[run] for run in firsts]


def _label(run: Run, keys: Sequence[str]) -> str:
    settings = flat_config(run.config)
    parts = ["dense"] if run.config.moe.is_dense else []
    parts += [f"{key.rpartition('.')[2]}={spelled(settings[key])}" for key in keys]
    return ",".join(parts).replace("d_ff_expert", "width") or "sparse"
