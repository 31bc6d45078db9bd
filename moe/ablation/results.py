"""Finished runs, and the cells that they form: runs that differ only in their seed belong to one cell."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import StepTime, spelled
from moe.ablation.statistics import Interval, paired_difference
from moe.accounting.counts import ModelCounts, count_parameters
from moe.config import Config, ConfigError, flat_config, load_config, unused_keys
from moe.runs.metrics_log import losses_by_text, read_metrics
from moe.runs.resuming import sets_results
from moe.runs.run_folder import RunFolder

WIDTH = "moe.d_ff_expert"
SCHEDULE = ("train.steps", "optim.warmup_steps")  # follow from the step time in a race by the clock


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    step_time: StepTime | None = None  # measured before a race by the clock; None: the run is part of none

    @property
    def settings(self) -> dict[str, Any]:
        """What distinguishes it from other runs: settings that affect results, except the seed.

        Without unused keys; in a race by the clock, without what follows from the step time.
        """
        unused = unused_keys(self.config)
        return {
            key: value
            for key, value in flat_config(self.config).items()
            if sets_results(key, self.config)
            and not key.startswith("run.")
            and not (self.step_time and key in SCHEDULE)
            and key not in unused
        }


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
    def losses_by_text(self) -> dict[str, float]:
        """Final `eval/NAME/loss` by the name of the text, mean over seeds."""
        evaluations = [[line for line in run.metrics if "eval/loss" in line] for run in self.runs.values()]
        last = [losses_by_text(lines[-1]) for lines in evaluations]
        return {name: statistics.mean(losses[name] for losses in last) for name in last[0]}

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

    @property
    def seconds(self) -> list[float]:
        """Training time of each run, in the order of `runs`."""
        return [training_seconds(run.metrics)[run.metrics[-1]["step"]] for run in self.runs.values()]

    @property
    def planned_seconds(self) -> float | None:
        """The time that it was planned for in a race by the clock; None if it is part of none."""
        time = next(iter(self.runs.values())).step_time
        return None if time is None else self.config.train.steps * time.seconds

    def time_relative_to(self, other: "CellResult") -> float:
        """Mean training time over that of another cell."""
        return statistics.mean(self.seconds) / statistics.mean(other.seconds)

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


def training_seconds(metrics: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Seconds of training up to each step in `metrics.jsonl`, without evaluations and checkpoints.

    A logged step stands for itself and for those since the one logged before; between two logged steps the
    time grows evenly. So the first step, which is slow and always logged, stands for itself alone.
    """
    steps, seconds = [0], [0.0]
    for line in metrics:
        if line.get("perf/step_s") is not None:
            seconds.append(seconds[-1] + (line["step"] - steps[-1]) * line["perf/step_s"])
            steps.append(line["step"])
    known = sorted({line["step"] for line in metrics})
    return dict(zip(known, np.interp(known, steps, seconds).tolist(), strict=True))


def read_runs(root: Path) -> tuple[list[Run], list[Path]]:
    """Read all finished runs below a folder, one per settings and seed; and the folders of further ones.

    Raises:
        ConfigError: there is no finished run, or a folder is not a complete run of train.py.
    """
    runs: dict[tuple[str, int], Run] = {}
    left_out, record = [], AblationFolder(root)
    step_times = {record.run(cell, 0).path.parent: time for cell, time in record.step_times().items()}
    for path in sorted(root.rglob("summary.json")):
        run = _read_run(path.parent, step_times.get(path.parent.parent))
        key = json.dumps(run.settings), run.config.run.seed
        if runs.setdefault(key, run) is not run:
            left_out.append(path.parent)
    if not runs:
        raise ConfigError("DIR", f"{root} holds no finished run (no summary.json); train some first")
    return list(runs.values()), left_out


def _read_run(path: Path, step_time: StepTime | None) -> Run:
    folder = RunFolder(path)
    try:
        summary, metrics = json.loads(folder.summary.read_text()), read_metrics(folder.metrics)
    except (OSError, ValueError):
        summary, metrics = None, []
    needed = {"final_eval_loss", "final_bits_per_byte", "tokens", "tokens_per_s"}
    if not isinstance(summary, dict) or not needed <= summary.keys() or not metrics:
        raise ConfigError("DIR", f"{path} has a summary.json, but not a complete run of train.py; remove it")
    return Run(path, load_config(folder.config), summary, metrics, step_time)


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
        settings = {key: value for key, value in run.settings.items() if is_compared(key)}
        groups.setdefault(json.dumps(settings), []).append(run)
    return list(groups.values())


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The settings in which these runs differ; one that a run does not use is no difference of it."""
    settings = [run.settings for run in runs]
    keys = settings[0] if settings else ()
    return [key for key in keys if len({spelled(some[key]) for some in settings if key in some}) > 1]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Labels of cells: their names in an ablation, else those of their runs, else what they differ in."""
    firsts = [group[0] for group in groups]
    folders = [{run.folder.parent.name for run in group} for group in groups]
    names = [min(some) for some in folders]
    by_ablation = all(re.fullmatch(r"seed-\d+", run.folder.name) for group in groups for run in group)
    if by_ablation and all(len(some) == 1 for some in folders) and len(set(names)) == len(names):
        return [
            f"{name} (dense)" if run.config.moe.is_dense and not name.startswith("dense") else name
            for name, run in zip(names, firsts, strict=True)
        ]
    names = [_common_name(group) for group in groups]
    if all(names) and len(set(names)) == len(names):
        return names
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


def _common_name(group: Sequence[Run]) -> str:
    """The name of the runs, or what their names have in common before the number of a seed."""
    names = [run.config.run.name for run in group]
    if len(set(names)) == 1:
        return names[0]
    stems = {re.sub(r"[-_.]*(seed)?[-_.]*\d+$", "", name) for name in names}
    return stems.pop() if len(stems) == 1 else ""


def _label(run: Run, keys: Sequence[str]) -> str:
    settings = flat_config(run.config)
    parts = ["dense"] if run.config.moe.is_dense else []
    parts += [f"{key.rpartition('.')[2]}={spelled(settings[key])}" for key in keys]
    return ",".join(parts).replace("d_ff_expert", "width") or "sparse"
