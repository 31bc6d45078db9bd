"""What a set of finished runs shows: figures by cell, and sentences that they support.

Runs that differ in their seed only are one cell. The baseline is the dense cell whose FLOPs are nearest to
the sparse ones'. Differences are paired by seed.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe.accounting import Ledger, count
from moe.config import Config, ConfigError
from moe.config_io import flat_config, load_config
from moe.run_folder import RunFolder
from moe.statistics import (
    Interval,
    PowerLaw,
    equivalent_size,
    fit_power_law,
    mean_interval,
    paired_difference,
)
from moe.tables import short
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


@dataclass(frozen=True)
class Cell:
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

    def mean(self, key: str) -> float | None:
        """Mean over seeds of a figure of the last training line; None where the model has none."""
        values = [line[key] for run in self.runs.values() for line in run.metrics[-3:] if key in line]
        return None if None in values or not values else statistics.mean(values)


def read_cells(root: Path) -> list[Cell]:
    """Every finished run below a folder, as cells in the order of their total parameters.

    Raises:
        ConfigError: there is none, or two runs of a cell have the same seed.
    """
    runs = [_read_run(path.parent) for path in sorted(root.rglob("summary.json"))]
    if not runs:
        raise ConfigError("DIR", f"{root} holds no finished run (no summary.json); train some first")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {k: v for k, v in flat_config(run.config).items() if not k.startswith(_SAME_EXPERIMENT)}
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    cells = []
    for label, group in zip(_labels(list(groups)), groups.values(), strict=True):
        by_seed = {run.config.run.seed: run for run in group}
        if len(by_seed) < len(group):
            raise ConfigError("DIR", f"{root} holds two runs of {label} with the same seed; remove one")
        cells.append(Cell(label, by_seed, count(group[0].config)))
    return sorted(cells, key=lambda cell: (not cell.is_dense, cell.ledger.total))


def _read_run(path: Path) -> Run:
    folder = RunFolder(path)
    return Run(
        path, load_config(folder.config), json.loads(folder.summary.read_text()), read_metrics(folder.metrics)
    )


def _labels(groups: Sequence[str]) -> Iterator[str]:
    """The settings that differ between groups, shortest names first."""
    settings = [json.loads(group) for group in groups]
    differing = [key for key in settings[0] if len({json.dumps(some[key]) for some in settings}) > 1]
    for some in settings:
        if some["moe.num_experts"] == 1:
            width = some["moe.d_ff_expert"]
            yield f"dense, width {width}"
        else:
            keys = [key for key in differing if key != "moe.d_ff_expert" or len(differing) == 1]
            yield ", ".join(f"{key.rpartition('.')[2]} {some[key]}" for key in keys) or "sparse"


@dataclass(frozen=True)
class Findings:
    """What the cells show together.

    Attributes:
        cells: all of them.
        baseline: the dense one of nearest FLOPs; None where there is no dense cell.
        differences: loss of each other cell minus the baseline's, paired by seed, by label.
        worth: parameters of the dense model of the same loss, by label of each sparse cell.
        law: loss as a power of total parameters over sparse cells of equal active FLOPs; None below 3.
    """

    cells: list[Cell]
    baseline: Cell | None
    differences: dict[str, Interval]
    worth: dict[str, Interval]
    law: PowerLaw | None


def analyse(cells: list[Cell]) -> Findings:
    """Compare the cells."""
    sparse, dense = [c for c in cells if not c.is_dense], [c for c in cells if c.is_dense]
    flops = statistics.median(cell.ledger.flops_per_token_train for cell in sparse or dense)
    baseline = min(dense, key=lambda c: abs(c.ledger.flops_per_token_train - flops), default=None)
    differences = {
        cell.label: paired_difference(cell.losses, baseline.losses)
        for cell in cells
        if baseline is not None and cell is not baseline and cell.losses.keys() & baseline.losses.keys()
    }
    sizes = {cell.ledger.active_no_input_emb: cell.losses for cell in dense}
    worth = {c.label: size for c in sparse if (size := equivalent_size(c.losses, sizes)) is not None}
    equal = [cell for cell in sparse if abs(cell.ledger.flops_per_token_train / flops - 1) <= 0.01]
    totals = [cell.ledger.total for cell in equal]
    law = None
    if len(set(totals)) > 2:
        law = fit_power_law(totals, [statistics.mean(cell.losses.values()) for cell in equal])
    return Findings(cells, baseline, differences, worth, law)


def sentences(findings: Findings) -> Iterator[str]:
    """What the data supports, and what it does not."""
    seeds = sorted({seed for cell in findings.cells for seed in cell.runs})
    sparse = [cell for cell in findings.cells if not cell.is_dense]
    if findings.baseline is None:
        yield "There is no dense run here, so nothing is compared with a dense model."
    elif len(seeds) < 2:
        yield "One seed tells no spread: no difference here is shown to be more than chance."
    else:
        known = {
            cell.label: findings.differences[cell.label]
            for cell in sparse
            if cell.label in findings.differences
        }
        better = [label for label, d in known.items() if d.high is not None and d.high < 0]
        worse = [label for label, d in known.items() if d.low is not None and d.low > 0]
        unclear = [label for label in known if label not in (*better, *worse)]
        base = f"the dense model of equal active FLOPs ({findings.baseline.label})"
        if better:
            best = min(better, key=lambda label: known[label].mean)
            yield (
                f"Better than {base}, paired over seeds, 95 %: {'; '.join(better)}. Best: {best}, by "
                f"{_interval(known[best], -1)} nats per token."
            )
        if worse:
            yield f"Worse than {base}: {'; '.join(worse)}."
        if unclear:
            yield f"Not told apart from {base} by {len(seeds)} seeds: {'; '.join(unclear)}."
        yield from _steps(sparse)
    if findings.law is not None:
        exponent = findings.law.exponent
        yield (
            "Loss against total parameters, active FLOPs equal: a power law of exponent "
            f"{_interval(exponent)}; largest residual {max(map(abs, findings.law.residuals)):.2%} of it."
        )
    for label, size in findings.worth.items():
        bounds = "" if size.low is None else f" [{short(size.low)}, {short(size.high or size.low)}]"
        yield (
            f"{label} is worth a dense model of {short(size.mean)}{bounds} active parameters (without the "
            "input embedding), by a power law through the dense runs."
        )


def _steps(sparse: list[Cell]) -> Iterator[str]:
    """Whether each larger model is better than the one before it."""
    for smaller, larger in pairwise(sparse):
        if len(smaller.runs.keys() & larger.runs.keys()) > 1:
            change = paired_difference(larger.losses, smaller.losses)
            if change.low is not None and change.high is not None and change.low <= 0 <= change.high:
                yield f"From {smaller.label} to {larger.label} no change is shown: {_interval(change)} nats."


def _interval(value: Interval, sign: int = 1) -> str:
    if value.low is None or value.high is None:
        return f"{sign * value.mean:.4f}"
    low, high = sorted((sign * value.low, sign * value.high))
    return f"{sign * value.mean:.4f} [{low:.4f}, {high:.4f}]"


COLUMNS: tuple[str, ...] = (
    "cell", "experts", "top_k", "d_ff_expert", "seeds", "params_total", "params_active", "flops_per_token",
    "loss", "loss_low", "loss_high", "bits_per_byte", "difference", "difference_low", "difference_high",
    "equivalent_dense_params", "tokens_per_s", "load_imbalance", "dead_experts", "router_entropy",
    "device_hours", "usd", "kwh", "tco2e",
)  # fmt: skip


def rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """A row of `results.csv` per cell; cost is summed over its seeds."""
    for cell in findings.cells:
        loss = mean_interval(list(cell.losses.values()))
        difference = findings.differences.get(cell.label, Interval(*(None,) * 3))  # type: ignore[arg-type]
        worth = findings.worth.get(cell.label)
        summaries = [run.summary for run in cell.runs.values()]
        costs = {
            key: None if None in values else sum(values)
            for key in ("device_hours", "usd", "kwh", "tco2e")
            for values in [[summary["cost"][key] for summary in summaries]]
        }
        yield dict(
            zip(
                COLUMNS,
                (
                    cell.label,
                    cell.config.moe.num_experts,
                    cell.config.moe.top_k,
                    cell.config.moe.d_ff_expert,
                    len(cell.runs),
                    cell.ledger.total,
                    cell.ledger.active_all,
                    cell.ledger.flops_per_token_train,
                    *loss,
                    statistics.mean(summary["final_bits_per_byte"] for summary in summaries),
                    *difference,
                    None if worth is None else worth.mean,
                    statistics.median(summary["tokens_per_s"] for summary in summaries),
                    cell.mean("moe/load_imbalance"),
                    cell.mean("moe/dead_experts"),
                    cell.mean("moe/router_entropy"),
                    *costs.values(),
                ),
                strict=True,
            )
        )
