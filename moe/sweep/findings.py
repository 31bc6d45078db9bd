"""What a set of finished runs shows: figures by cell, and sentences that they support.

Runs that differ in their seed only are one cell. Cells that differ in settings of the experts only are
compared with each other; their baseline is the dense cell whose FLOPs are nearest to the sparse ones'.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.accounting import Ledger, count
from moe.config import Config, ConfigError
from moe.config_io import flat_config, load_config
from moe.run_folder import RunFolder
from moe.sweep.plan import TOLERANCE
from moe.sweep.statistics import (
    Interval,
    PowerLaw,
    equivalent_size,
    fit_power_law,
    mean_interval,
    paired_difference,
)
from moe.telemetry import read_metrics

_SAME_EXPERIMENT = ("run.", "log.", "cost.", "parallel.", "train.micro_batch_size", "data.cache_dir")


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
        ledger: counts of their configuration.
    """

    label: str
    runs: Mapping[int, Run]
    ledger: Ledger

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
    def mean_loss(self) -> float:
        """Over its seeds."""
        return statistics.mean(self.losses.values())

    @property
    def tokens_per_s(self) -> float:
        """Median over its seeds."""
        return statistics.median(run.summary["tokens_per_s"] for run in self.runs.values())

    def mean(self, key: str) -> float | None:
        """Mean of a logged figure over the last tenth of its log and over seeds; None where there is none."""
        values = []
        for run in self.runs.values():
            logged = [line[key] for line in run.metrics if line.get(key) is not None]
            values += logged[-max(1, len(logged) // 10) :]
        return statistics.mean(values) if values else None


def read_cells(root: Path) -> list[CellResult]:
    """Every finished run below a folder, as cells: dense ones first, then by total parameters.

    Raises:
        ConfigError: there is none, or two runs of a cell have the same seed.
    """
    runs = [_read_run(path.parent) for path in sorted(root.rglob("summary.json"))]
    if not runs:
        raise ConfigError("DIR", f"{root} holds no finished run (no summary.json); train some first")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_settings(run.config), []).append(run)
    cells = []
    for label, group in zip(_labels([group[0] for group in groups.values()]), groups.values(), strict=True):
        by_seed = {run.config.run.seed: run for run in group}
        if len(by_seed) < len(group):
            raise ConfigError("DIR", f"{root} holds two runs of {label} with the same seed; remove one")
        cells.append(CellResult(label, by_seed, count(group[0].config)))
    return sorted(cells, key=lambda cell: (not cell.is_dense, cell.ledger.total, cell.label))


def _read_run(path: Path) -> Run:
    folder = RunFolder(path)
    try:
        summary = json.loads(folder.summary.read_text())
    except ValueError:
        raise ConfigError("DIR", f"{folder.summary} is not JSON; run that training again") from None
    return Run(path, load_config(folder.config), summary, read_metrics(folder.metrics))


def _settings(config: Config, without: str = "\0") -> str:
    """All that makes the experiment, but for keys of one beginning."""
    return json.dumps(
        {k: v for k, v in flat_config(config).items() if not k.startswith((*_SAME_EXPERIMENT, without))},
        sort_keys=True,
        default=str,
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """What differs among the sparse ones, and among the dense ones; the experts' width only where needed."""
    labels = {}
    for is_dense in (False, True):
        some = [
            (i, flat_config(run.config)) for i, run in enumerate(runs) if run.config.moe.is_dense == is_dense
        ]
        keys = [
            key
            for key in (some[0][1] if some else ())
            if not key.startswith(_SAME_EXPERIMENT) and len({str(settings[key]) for _, settings in some}) > 1
        ]
        for keep in ([key for key in keys if key != "moe.d_ff_expert"], keys):
            named = {
                i: ",".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in keep)
                for i, settings in some
            }
            if len(set(named.values())) == len(named):
                break
        for i, name in named.items():
            kind = ["dense"] if is_dense else [] if name else ["sparse"]
            labels[i] = ",".join([*kind, *([name] if name else [])]).replace("d_ff_expert", "width")
    return [labels[i] for i in range(len(runs))]


@dataclass(frozen=True)
class Findings:
    """What cells that differ in settings of the experts only show together.

    Attributes:
        cells: all of them.
        baseline: the dense one of nearest FLOPs; None where there is no dense cell.
        differences: loss of each other cell minus the baseline's, paired by seed, by label.
        worth: active parameters (without the input embedding) of the dense model of the same loss, by label
            of each sparse cell.
        dense_law: loss as a power of those parameters over the dense cells; None below 2.
        law: loss as a power of total parameters over cells of equal active FLOPs; None below 3 totals.
    """

    cells: list[CellResult]
    baseline: CellResult | None
    differences: dict[str, Interval]
    worth: dict[str, Interval]
    dense_law: PowerLaw | None
    law: PowerLaw | None


def analyse(cells: Sequence[CellResult]) -> list[Findings]:
    """Compare cells that differ in settings of the experts only; one finding per set of such cells."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(_settings(cell.config, "moe."), []).append(cell)
    return [_compare(group) for group in groups.values()]


def _compare(cells: list[CellResult]) -> Findings:
    sparse, dense = [c for c in cells if not c.is_dense], [c for c in cells if c.is_dense]
    flops = statistics.median_low([cell.ledger.flops_per_token_forward for cell in sparse or dense])
    baseline = min(dense, key=lambda cell: abs(cell.ledger.flops_per_token_forward - flops), default=None)
    differences = {
        cell.label: paired_difference(cell.losses, baseline.losses)
        for cell in cells
        if baseline is not None and cell is not baseline and cell.losses.keys() & baseline.losses.keys()
    }
    sizes = {cell.ledger.active_no_input_emb: cell.losses for cell in dense}
    worth = {c.label: size for c in sparse if (size := equivalent_size(c.losses, sizes)) is not None}
    equal = [cell for cell in cells if abs(cell.ledger.flops_per_token_forward / flops - 1) <= TOLERANCE]
    return Findings(
        cells,
        baseline,
        differences,
        worth,
        _law({cell: cell.ledger.active_no_input_emb for cell in dense}, 2),
        _law({cell: cell.ledger.total for cell in equal}, 3),
    )


def _law(sizes: Mapping[CellResult, int], fewest: int) -> PowerLaw | None:
    if len(set(sizes.values())) < fewest:
        return None
    return fit_power_law(list(sizes.values()), [cell.mean_loss for cell in sizes])


COLUMNS: tuple[str, ...] = (
    "cell", "experts", "top_k", "d_ff_expert", "seeds", "params_total", "params_active", "flops_per_token",
    "loss", "loss_low", "loss_high", "bits_per_byte", "difference", "difference_low", "difference_high",
    "equivalent_dense_params", "equivalent_dense_params_low", "equivalent_dense_params_high",
    "tokens_per_s", "load_imbalance", "dead_experts", "router_entropy", "dropped_fraction",
    "flops", "device_hours", "usd", "kwh", "tco2e",
)  # fmt: skip
_NONE = (None, None, None)


def rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """A row of `results.csv` per cell; FLOPs and cost are summed over its seeds."""
    for cell in findings.cells:
        summaries = [run.summary for run in cell.runs.values()]
        costs = [[summary.get("cost", {}).get(key) for summary in summaries] for key in COLUMNS[-4:]]
        values = (
            cell.label,
            cell.config.moe.num_experts,
            cell.config.moe.top_k,
            cell.config.moe.d_ff_expert,
            len(cell.runs),
            cell.ledger.total,
            cell.ledger.active_all,
            cell.ledger.flops_per_token_train,
            *mean_interval(list(cell.losses.values())),
            statistics.mean(summary["final_bits_per_byte"] for summary in summaries),
            *findings.differences.get(cell.label, _NONE),
            *findings.worth.get(cell.label, _NONE),
            cell.tokens_per_s,
            cell.mean("moe/load_imbalance"),
            cell.mean("moe/dead_experts"),
            cell.mean("moe/router_entropy"),
            cell.mean("moe/dropped_fraction"),
            sum(summary["tokens"] for summary in summaries) * cell.ledger.flops_per_token_train,
            *(None if None in some else sum(some) for some in costs),
        )
        yield dict(zip(COLUMNS, values, strict=True))
