"""What finished runs show together: differences, fits, and the rows of `results.csv`.

Cells that differ in settings of the experts only are compared with each other; their baseline is the dense
cell whose FLOPs are nearest to those of the sparse ones.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe.ablation.cells import TOLERANCE, spelled
from moe.ablation.results import CellResult, Run, cells_of, differing_keys, group_runs
from moe.ablation.statistics import (
    Interval,
    PowerLaw,
    equivalent_size,
    fit_power_law,
    mean_interval,
    paired_difference,
)
from moe.config import flat_config

_WIDTH = "moe.d_ff_expert"
_EXPERTS = "moe.num_experts"
_GRANULARITY = (_EXPERTS, "moe.top_k", "moe.num_shared_experts", _WIDTH)  # change together
_APART = 2  # times the total parameters, at least, between the ends of a power law in them


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
class Comparison:
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


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Compare runs that differ in seed and in settings of the experts only; one comparison per such set."""
    sets = group_runs(runs, lambda key: not key.startswith("moe."))
    keys = [key for key in differing_keys([some[0] for some in sets]) if not key.startswith("moe.")]
    comparisons = []
    for some in sets:
        settings = flat_config(some[0].config)
        title = ", ".join(f"{key}={spelled(settings[key])}" for key in keys)
        comparisons.append(_compare(title, cells_of(some)))
    return comparisons


def _compare(title: str, cells: list[CellResult]) -> Comparison:
    sparse, dense = [c for c in cells if not c.is_dense], [c for c in cells if c.is_dense]
    flops = statistics.median_low([cell.flops for cell in sparse or dense])
    baseline = min(dense, key=lambda cell: abs(cell.flops - flops), default=None)
    differences = {
        cell.label: paired_difference(cell.losses, baseline.losses)
        for cell in cells
        if baseline is not None and cell is not baseline and cell.losses.keys() & baseline.losses.keys()
    }
    sizes = {cell.counts.active_no_input_emb: cell.losses for cell in dense}
    law = fit_power_law(list(sizes), list(sizes.values())) if len(sizes) > 1 else None
    worth: dict[str, Interval] = {}
    if law is not None and not law.may_be_flat:
        worth = {c.label: size for c in sparse if (size := equivalent_size(c.losses, sizes)) is not None}
    return Comparison(title, cells, baseline, differences, worth, law, _curves(sparse, baseline))


def _curves(sparse: Sequence[CellResult], baseline: CellResult | None) -> list[Curve]:
    settings = {cell: flat_config(cell.config) for cell in sparse}
    varied = differing_keys([next(iter(cell.runs.values())) for cell in sparse]) if sparse else []

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
    totals, flops = [cell.counts.total for cell in cells], [cell.flops for cell in cells]
    if max(flops) > (1 + TOLERANCE) ** 2 * min(flops):
        return None
    if len(set(totals)) < 3 or max(totals) < _APART * min(totals):
        return None
    return fit_power_law(totals, [cell.losses for cell in cells])


def rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """A row of `results.csv` per cell; FLOPs and cost are those of a run, mean over its seeds."""
    for cell in comparison.cells:
        moe, counts = cell.config.moe, cell.counts
        summaries = [run.summary for run in cell.runs.values()]
        row = {
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
            "baseline": None if comparison.baseline is None else comparison.baseline.label,
            **_bounds("difference", comparison.differences.get(cell.label)),
            **_bounds("equivalent_dense_params_no_input_emb", comparison.worth.get(cell.label)),
            "tokens_per_s": cell.tokens_per_s,
        }
        for key in ("load_imbalance", "dead_experts", "router_entropy", "dropped_fraction"):
            row[key] = cell.mean(f"moe/{key}")
        row["flops"] = statistics.mean(s["tokens"] for s in summaries) * counts.flops_per_token_train
        yield row | {key: cell.cost(key) for key in ("device_hours", "usd", "kwh", "tco2e")}


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    mean, low, high = value or (None, None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
