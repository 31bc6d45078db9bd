"""Finished runs, and the cells they make up: runs that differ in their seed only are one cell."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.ablation.cells import DENSE_KEYS, spelled
from moe.accounting.counts import ModelCounts, count_parameters
from moe.config import Config, ConfigError, flat_config, load_config
from moe.runs.metrics_log import read_metrics
from moe.runs.resuming import sets_results
from moe.runs.run_folder import RunFolder

_WIDTH = "moe.d_ff_expert"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def loss(self) -> float:
        """Final validation loss, nats per token."""
        return self.summary["final_eval_loss"]


@dataclass(frozen=True, eq=False)
class CellResult:
    """Runs that differ in their seed only.

    Attributes:
        label: what sets it apart from the other cells.
        runs: by seed.
        counts: parameters and FLOPs of their configuration.
    """

    label: str
    runs: Mapping[int, Run]
    counts: ModelCounts

    @property
    def config(self) -> Config:
        """Of any of its runs."""
        return next(iter(self.runs.values())).config

    @property
    def is_dense(self) -> bool:
        """No router."""
        return self.config.moe.is_dense

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss by seed."""
        return {seed: run.loss for seed, run in self.runs.items()}

    @property
    def flops(self) -> int:
        """Forward, per token."""
        return self.counts.flops_per_token_forward

    @property
    def mean_loss(self) -> float:
        """Over its seeds."""
        return statistics.mean(self.losses.values())

    @property
    def tokens_per_s(self) -> float:
        """Median over its seeds."""
        return statistics.median(run.summary["tokens_per_s"] for run in self.runs.values())

    def cost(self, key: str) -> float | None:
        """Mean over its seeds of a figure of `cost` in their summaries; None where one does not know it."""
        values = [run.summary.get("cost", {}).get(key) for run in self.runs.values()]
        return None if None in values else statistics.mean(values)

    def mean(self, key: str) -> float | None:
        """Mean of a logged figure over the last tenth of its log and over seeds; None where there is none."""
        values = []
        for run in self.runs.values():
            logged = [line[key] for line in run.metrics if line.get(key) is not None]
            values += logged[-max(1, len(logged) // 10) :]
        return statistics.mean(values) if values else None


def read_runs(root: Path) -> tuple[list[Run], list[Path]]:
    """Every finished run below a folder; and folders left out, of the same settings and seed as another.

    Raises:
        ConfigError: there is none, or one that train.py did not write.
    """
    runs: dict[tuple[str, int], Run] = {}
    left_out = []
    for path in sorted(root.rglob("summary.json")):
        run = _read_run(path.parent)
        key = json.dumps(_settings(run.config)), run.config.run.seed
        if key in runs:
            left_out.append(path.parent)
        runs.setdefault(key, run)
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
        raise ConfigError("DIR", f"{path} holds a summary.json, but not that of a run; remove it")
    return Run(path, load_config(folder.config), summary, metrics)


def _settings(config: Config) -> dict[str, Any]:
    """All that sets the results, but for the seed; a dense model has no routing."""
    return {
        key: value
        for key, value in flat_config(config).items()
        if sets_results(key)
        and not key.startswith("run.")
        and (not config.moe.is_dense or not key.startswith("moe.") or key in DENSE_KEYS)
    }


def cells_of(runs: Sequence[Run]) -> list[CellResult]:
    """The cells that these runs make up, dense ones first, then by total parameters."""
    groups = group_runs(runs, lambda _: True)
    cells = [
        CellResult(label, {run.config.run.seed: run for run in group}, count_parameters(group[0].config))
        for label, group in zip(_labels(groups), groups, strict=True)
    ]
    return sorted(cells, key=lambda cell: (not cell.is_dense, cell.counts.total, cell.label))


def group_runs(runs: Sequence[Run], counts: Callable[[str], bool]) -> list[list[Run]]:
    """Groups of runs that share every setting for whose key `counts` is true; the seed is not looked at."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in _settings(run.config).items() if counts(key)}
        groups.setdefault(json.dumps(settings), []).append(run)
    return list(groups.values())


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Settings that these runs do not share."""
    settings = [_settings(run.config) for run in runs]
    return [key for key in settings[0] if len({spelled(some.get(key)) for some in settings}) > 1]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names of cells: those of their folders, where an ablation made these; else what differs."""
    folders = [{run.folder.parent.name for run in group} for group in groups]
    by_ablation = all(re.fullmatch(r"seed-\d+", run.folder.name) for group in groups for run in group)
    names = [min(some) for some in folders]
    if by_ablation and all(len(some) == 1 for some in folders) and len(set(names)) == len(names):
        dense = [
            group[0].config.moe.is_dense and not name.startswith("dense")
            for name, group in zip(names, groups, strict=True)
        ]
        return [f"{name} (dense)" if is_dense else name for name, is_dense in zip(names, dense, strict=True)]
    labels: dict[int, str] = {}
    for is_dense in (False, True):
        first = {i: group[0] for i, group in enumerate(groups) if group[0].config.moe.is_dense == is_dense}
        keys = differing_keys(list(first.values())) if first else []
        for wanted in ([key for key in keys if key != _WIDTH], keys):  # the width only where it is needed
            names = [
                ",".join(
                    [
                        *(["dense"] if is_dense else []),
                        *(
                            f"{key.rpartition('.')[2]}={spelled(flat_config(run.config)[key])}"
                            for key in wanted
                        ),
                    ]
                )
                for run in first.values()
            ]
            if len(set(names)) == len(names):
                break
        labels |= {
            i: name.replace("d_ff_expert", "width") or "sparse" for i, name in zip(first, names, strict=True)
        }
    return [labels[i] for i in range(len(groups))]
