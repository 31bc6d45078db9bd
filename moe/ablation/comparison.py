"""What a set of finished runs shows: cells, differences, fits, and the rows of results.csv.

Runs that differ in their seed only are one cell. Cells that differ in settings of the experts only are
compared with each other; their baseline is the dense cell whose FLOPs are nearest to the sparse ones'.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.ablation.cells import DENSE_KEYS, TOLERANCE, spelled
from moe.ablation.statistics import (
    Interval,
    PowerLaw,
    equivalent_size,
    fit_power_law,
    mean_interval,
    paired_difference,
)
from moe.accounting.counts import Ledger, count
from moe.config.loading import flat_config, load_config
from moe.config.schema import Config, ConfigError
from moe.runs.metrics_log import read_metrics
from moe.runs.run_folder import RunFolder, sets_results

_WIDTH = "moe.d_ff_expert"
_EXPERTS = "moe.num_experts"
_GRANULARITY = (_EXPERTS, "moe.top_k", "moe.num_shared_experts", _WIDTH)  # change together
_APART = 2  # times the total parameters, at least, between the ends of a power law in them


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
    def flops(self) -> int:
        """Forward, per token."""
        return self.ledger.flops_per_token_forward

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


@dataclass(frozen=True)
class Curve:
    """Sparse cells that differ in one setting only, but for the width where that follows from the others.

    Attributes:
        key: the setting; empty for several that change together, as those of the granularity do.
        cells: in the order of its values.
        law: for numbers of experts: loss as a power of total parameters, over cells of equal FLOPs, with the
            baseline; None below 3 totals or where the largest is less than twice the smallest.
    """

    key: str
    cells: Sequence[CellResult]
    law: PowerLaw | None


@dataclass(frozen=True)
class Findings:
    """What cells that differ in settings of the experts only show together.

    Attributes:
        title: the settings that set them apart from other such sets; empty where there is one.
        cells: all of them, dense ones first, then by total parameters.
        baseline: the dense one of nearest FLOPs; None where there is no dense cell.
        differences: loss of each other cell minus the baseline's, paired by seed, by label; cells without a
            seed in common are left out.
        worth: active parameters (without the input embedding) of the dense model of the same loss, by label
            of each sparse cell; empty where the dense law may be flat.
        dense_law: loss as a power of those parameters over the dense cells; None below 2 sizes.
        curves: along each varied setting.
    """

    title: str
    cells: Sequence[CellResult]
    baseline: CellResult | None
    differences: Mapping[str, Interval]
    worth: Mapping[str, Interval]
    dense_law: PowerLaw | None
    curves: Sequence[Curve]

    @property
    def sparse(self) -> list[CellResult]:
        """Cells with a router."""
        return [cell for cell in self.cells if not cell.is_dense]

    @property
    def dense(self) -> list[CellResult]:
        """Cells without one."""
        return [cell for cell in self.cells if cell.is_dense]


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


def analyse(runs: Sequence[Run]) -> list[Findings]:
    """Compare runs that differ in seeds and settings of the experts only; a finding per set of such runs."""
    sets = _grouped(runs, lambda key: not key.startswith("moe."))
    apart = _differing([some[0] for some in sets])
    found = []
    for some in sets:
        groups = _grouped(some, lambda _: True)
        cells = [
            CellResult(label, {run.config.run.seed: run for run in group}, count(group[0].config))
            for label, group in zip(_labels(groups), groups, strict=True)
        ]
        cells.sort(key=lambda cell: (not cell.is_dense, cell.ledger.total, cell.label))
        settings = flat_config(some[0].config)
        title = ", ".join(f"{key}={spelled(settings[key])}" for key in apart if not key.startswith("moe."))
        found.append(_compare(title, cells))
    return found


def _grouped(runs: Sequence[Run], counts: Callable[[str], bool]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in _settings(run.config).items() if counts(key)}
        groups.setdefault(json.dumps(settings), []).append(run)
    return list(groups.values())


def _differing(runs: Sequence[Run]) -> list[str]:
    """Settings that these runs do not share."""
    settings = [_settings(run.config) for run in runs]
    return [key for key in settings[0] if len({spelled(some.get(key)) for some in settings}) > 1]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Names of cells: of their folders, where these are a sweep's; else what differs."""
    folders = [{run.folder.parent.name for run in group} for group in groups]
    by_sweep = all(re.fullmatch(r"seed-\d+", run.folder.name) for group in groups for run in group)
    names = [min(some) for some in folders]
    if by_sweep and all(len(some) == 1 for some in folders) and len(set(names)) == len(names):
        dense = [
            group[0].config.moe.is_dense and not name.startswith("dense")
            for name, group in zip(names, groups, strict=True)
        ]
        return [f"{name} (dense)" if is_dense else name for name, is_dense in zip(names, dense, strict=True)]
    labels: dict[int, str] = {}
    for is_dense in (False, True):
        first = {i: group[0] for i, group in enumerate(groups) if group[0].config.moe.is_dense == is_dense}
        keys = _differing(list(first.values())) if first else []
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


def _compare(title: str, cells: list[CellResult]) -> Findings:
    sparse, dense = [c for c in cells if not c.is_dense], [c for c in cells if c.is_dense]
    flops = statistics.median_low([cell.flops for cell in sparse or dense])
    baseline = min(dense, key=lambda cell: abs(cell.flops - flops), default=None)
    differences = {
        cell.label: paired_difference(cell.losses, baseline.losses)
        for cell in cells
        if baseline is not None and cell is not baseline and cell.losses.keys() & baseline.losses.keys()
    }
    sizes = {cell.ledger.active_no_input_emb: cell.losses for cell in dense}
    law = fit_power_law(list(sizes), list(sizes.values())) if len(sizes) > 1 else None
    worth: dict[str, Interval] = {}
    if law is not None and not law.may_be_flat:
        worth = {c.label: size for c in sparse if (size := equivalent_size(c.losses, sizes)) is not None}
    return Findings(title, cells, baseline, differences, worth, law, _curves(sparse, baseline))


def _curves(sparse: Sequence[CellResult], baseline: CellResult | None) -> list[Curve]:
    settings = {cell: flat_config(cell.config) for cell in sparse}
    varied = _differing([next(iter(cell.runs.values())) for cell in sparse]) if sparse else []

    def groups(keys: Sequence[str]) -> list[list[CellResult]]:
        """Cells that share all but these settings, in the order of their values."""
        found: dict[str, list[CellResult]] = {}
        for cell in sparse:
            others = [settings[cell][key] for key in varied if key not in keys]
            found.setdefault(json.dumps(others), []).append(cell)
        return [
            sorted(cells, key=lambda c: [(settings[c][key] is None, settings[c][key]) for key in keys])
            for cells in found.values()
            if len(cells) > 1
        ]

    without_width = [key for key in varied if key != _WIDTH]
    if len({json.dumps([settings[cell][key] for key in without_width]) for cell in sparse}) == len(sparse):
        varied = without_width
    curves = []
    for key in varied:
        for cells in groups([key]):
            law = _law([*([baseline] if baseline else []), *cells]) if key == _EXPERTS else None
            curves.append(Curve(key, cells, law))
    if not any(curve.key in _GRANULARITY for curve in curves):
        curves += [Curve("", cells, None) for cells in groups(_GRANULARITY)]
    return curves


def _law(cells: Sequence[CellResult]) -> PowerLaw | None:
    """Loss against total parameters, where active FLOPs are equal and there is something to fit."""
    totals, flops = [cell.ledger.total for cell in cells], [cell.flops for cell in cells]
    if max(flops) > (1 + TOLERANCE) ** 2 * min(flops):
        return None
    if len(set(totals)) < 3 or max(totals) < _APART * min(totals):
        return None
    return fit_power_law(totals, [cell.losses for cell in cells])


def rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """A row of `results.csv` per cell; FLOPs and cost are those of a run, mean over its seeds."""
    for cell in findings.cells:
        moe, ledger = cell.config.moe, cell.ledger
        summaries = [run.summary for run in cell.runs.values()]
        row = {
            "set": findings.title,
            "cell": cell.label,
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "d_ff_expert": moe.d_ff_expert,
            "seeds": len(cell.runs),
            "params_total": ledger.total,
            "params_active": ledger.active_all,
            "params_active_no_input_emb": ledger.active_no_input_emb,
            "flops_per_token": ledger.flops_per_token_train,
            **_bounds("loss", mean_interval(list(cell.losses.values()))),
            "bits_per_byte": statistics.mean(summary["final_bits_per_byte"] for summary in summaries),
            "baseline": None if findings.baseline is None else findings.baseline.label,
            **_bounds("difference", findings.differences.get(cell.label)),
            **_bounds("equivalent_dense_params_no_input_emb", findings.worth.get(cell.label)),
            "tokens_per_s": cell.tokens_per_s,
        }
        for key in ("load_imbalance", "dead_experts", "router_entropy", "dropped_fraction"):
            row[key] = cell.mean(f"moe/{key}")
        row["flops"] = statistics.mean(s["tokens"] for s in summaries) * ledger.flops_per_token_train
        yield row | {key: cell.cost(key) for key in ("device_hours", "usd", "kwh", "tco2e")}


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    mean, low, high = value or (None, None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
