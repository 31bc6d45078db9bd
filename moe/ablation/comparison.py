"""Comparisons of finished runs: differences, fits and the rows of `results.csv`.

Cells are compared with each other if they differ only in settings of the experts. Their baseline is the dense
cell whose FLOPs are nearest to those of the sparse cells.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.ablation.cells import TOLERANCE, spelled
from moe.ablation.results import WIDTH, CellResult, Run, cells_of, differing_keys, group_runs
from moe.ablation.statistics import Interval, PowerLaw, equivalent_size, fit_power_law, mean_interval
from moe.config import flat_config

_EXPERTS = "moe.num_experts"
_GRANULARITY = (_EXPERTS, "moe.top_k", "moe.num_shared_experts", WIDTH)  # change together
_ROUTER_METRICS = ("load_imbalance", "dead_experts", "router_entropy", "dropped_fraction")
VAGUE = 10  # an equivalent size whose interval spans a larger factor is not reported
_MIN_RATIO = 2  # of the largest to the smallest total parameters, for a power law in them


@dataclass(frozen=True)
class Curve:
    """Sparse cells that differ in one setting, and in the width if that follows from the other settings."""

    key: str  # the setting; empty for the settings that a granularity changes together
    cells: Sequence[CellResult]  # in the order of the setting's values
    law: PowerLaw | None  # for numbers of experts: loss as a power of total parameters, with the baseline


@dataclass(frozen=True)
class Comparison:
    """Results of cells that differ only in settings of the experts. Mappings are by label.

    A size is the number of active parameters without the input embedding. In a race by the clock, cells
    differ in their tokens too, so no law in sizes is fitted.
    """

    title: str  # the settings that distinguish it from other comparisons; empty if it is the only one
    dense: Sequence[CellResult]  # by total parameters
    sparse: Sequence[CellResult]  # by total parameters
    baseline: CellResult | None  # the dense cell whose FLOPs are nearest to those of the sparse cells
    differences: Mapping[str, Interval]  # loss minus the baseline's, if they have a seed in common
    worth: Mapping[str, Interval]  # size of the dense model with the same loss, unless dense_law may be flat
    vague: Sequence[str]  # labels of the cells whose size is too uncertain to report
    dense_law: PowerLaw | None  # loss over the dense cells as a power of size; None for fewer than 2 sizes
    curves: Sequence[Curve]  # along each varied setting
    is_race: bool  # whether all cells were trained for equal time, instead of equal tokens

    @property
    def cells(self) -> list[CellResult]:
        """All cells, dense cells first."""
        return [*self.dense, *self.sparse]


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Compare runs: one comparison per set of runs that differ only in seed and settings of the experts."""
    sets = group_runs(runs, lambda key: not key.startswith("moe."))
    keys = [key for key in differing_keys([some[0] for some in sets]) if not key.startswith("moe.")]
    settings = [flat_config(some[0].config) for some in sets]
    titles = [", ".join(f"{key}={spelled(values[key])}" for key in keys) for values in settings]
    return [_compare(title, cells_of(some)) for title, some in zip(titles, sets, strict=True)]


def _compare(title: str, cells: list[CellResult]) -> Comparison:
    dense, sparse = [c for c in cells if c.is_dense], [c for c in cells if not c.is_dense]
    flops = statistics.median_low([cell.flops for cell in sparse or dense])
    baseline = min(dense, key=lambda cell: abs(cell.flops - flops), default=None)
    differences = {
        cell.label: difference
        for cell in cells
        if baseline and cell is not baseline and (difference := cell.difference_to(baseline)) is not None
    }
    is_race = all(cell.planned_seconds is not None for cell in cells)
    sizes = {} if is_race else {cell.counts.active_no_input_emb: cell.losses for cell in dense}
    law = fit_power_law(list(sizes), list(sizes.values())) if len(sizes) > 1 else None
    worth: dict[str, Interval] = {}
    vague: list[str] = []
    if law is not None and not law.may_be_flat:
        worth = {c.label: size for c in sparse if (size := equivalent_size(c.losses, sizes)) is not None}
        vague = [label for label, size in worth.items() if (size.high or 1) > VAGUE * (size.low or 1)]
        worth = {label: size for label, size in worth.items() if label not in vague}
    curves = _curves(sparse, baseline)
    return Comparison(title, dense, sparse, baseline, differences, worth, vague, law, curves, is_race)


def _curves(sparse: Sequence[CellResult], baseline: CellResult | None) -> list[Curve]:
    settings = {cell: flat_config(cell.config) for cell in sparse}
    varied = differing_keys([next(iter(cell.runs.values())) for cell in sparse])

    def groups(keys: Sequence[str]) -> list[list[CellResult]]:
        """Groups of cells that differ only in these settings, in the order of their values."""
        found: dict[str, list[CellResult]] = {}
        for cell in sparse:
            others = [settings[cell][key] for key in varied if key not in keys]
            found.setdefault(json.dumps(others), []).append(cell)
        return [
            sorted(cells, key=lambda c: [(settings[c][key] is None, settings[c][key]) for key in keys])
            for cells in found.values()
            if len(cells) > 1
        ]

    without_width = [key for key in varied if key != WIDTH]
    if len({json.dumps([settings[cell][key] for key in without_width]) for cell in sparse}) == len(sparse):
        varied = without_width
    before = [baseline] if baseline else []
    curves = [
        Curve(key, cells, _law([*before, *cells]) if key == _EXPERTS else None)
        for key in varied
        for cells in groups([key])
    ]
    if not any(curve.key in _GRANULARITY for curve in curves):
        curves += [Curve("", cells, None) for cells in groups(_GRANULARITY)]
    return curves


def _law(cells: Sequence[CellResult]) -> PowerLaw | None:
    """Loss as a power of total parameters, for equal FLOPs and enough different totals."""
    totals, flops = [cell.counts.total for cell in cells], [cell.flops for cell in cells]
    unequal = max(flops) > (1 + TOLERANCE) ** 2 * min(flops) or cells[0].planned_seconds is not None
    if unequal or len(set(totals)) < 3 or max(totals) < _MIN_RATIO * min(totals):
        return None
    return fit_power_law(totals, [cell.losses for cell in cells])


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One row of `results.csv` per cell. FLOPs and cost are per run, mean over seeds.

    `seconds` and `step_ms` are the measured training time, without evaluations and checkpoints.
    """
    for cell in comparison.cells:
        seconds, steps = cell.seconds, cell.config.train.steps
        planned = cell.planned_seconds
        moe, counts = cell.config.moe, cell.counts
        summaries = [run.summary for run in cell.runs.values()]
        yield {
            "set": comparison.title,
            "cell": cell.label,
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "d_ff_expert": moe.d_ff_expert,
            "seeds": len(cell.runs),
            "params_total": counts.total,
            "params_active": counts.active_all,
            "params_active_no_input_emb": counts.active_no_input_emb,
            "flops_per_token": counts.flops_per_token_train,
            **_bounds("loss", mean_interval(list(cell.losses.values()))),
            "bits_per_byte": statistics.mean(summary["final_bits_per_byte"] for summary in summaries),
            "baseline": comparison.baseline and comparison.baseline.label,
            **_bounds("difference", comparison.differences.get(cell.label)),
            **_bounds("equivalent_dense_params_no_input_emb", comparison.worth.get(cell.label)),
            "tokens_per_s": cell.tokens_per_s,
            **{key: cell.mean(f"moe/{key}") for key in _ROUTER_METRICS},
            "flops": statistics.mean(s["tokens"] for s in summaries) * counts.flops_per_token_train,
            **{key: cell.cost(key) for key in ("device_hours", "usd", "kwh", "tco2e")},
            "steps": steps,
            "tokens": statistics.mean(summary["tokens"] for summary in summaries),
            "step_ms": 1000 * statistics.mean(seconds) / steps,
            "seconds": statistics.mean(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "seconds_to_baseline": comparison.baseline and cell.time_relative_to(comparison.baseline),
            "planned_step_ms": planned and 1000 * planned / steps,
            "planned_seconds": planned,
            **{f"loss/{name}": loss for name, loss in cell.losses_by_text.items()},
        }


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    mean, low, high = value or (None, None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
