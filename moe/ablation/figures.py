"""The figures of an ablation; each one has its units and can be read without colour."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from moe.ablation.cells import TOLERANCE
from moe.ablation.comparison import Comparison
from moe.ablation.results import CellResult, Run

_MARKERS, _LINES = "osD^vP*X", ("-", "--", "-.", ":")
_INK, _SPARSE, _DENSE = "#222222", "#7f9fca", "#dddddd"
_LOSS = "validation loss (nats per token)"
_HEALTH = {
    "load_imbalance": "Load of the busiest expert over the mean",
    "router_entropy": "Entropy of the router (nats)",
    "dead_experts": "Experts without a token, summed over layers",
    "dropped_fraction": "Assignments dropped by capacity (fraction)",
}
_COST = {
    "device_hours": "Device hours of a run",
    "usd": "Price of a run (USD)",
    "kwh": "Energy of a run (kWh)",
    "tco2e": "Emissions of a run (t CO2e)",
}


class _Figure(NamedTuple):
    name: str
    title: str
    caption: str
    fill: Callable[[Axes], None]


def draw_figures(comparison: Comparison, folder: Path, suffix: str) -> list[tuple[Path, str]]:
    """Draw everything that the cells have.

    Args:
        comparison: to show.
        folder: of the PNGs.
        suffix: of their names.

    Returns:
        The PNGs with their captions.
    """
    pictures = []
    for name, title, caption, fill in _figures(comparison):
        figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=130, layout="constrained")
        fill(axes)
        axes.set_title(title, fontsize=12)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        path = folder / f"{name}{suffix}.png"
        figure.savefig(path)
        plt.close(figure)
        pictures.append((path, f"{title}. {caption}".strip()))
    return pictures


def _figures(comparison: Comparison) -> Iterator[_Figure]:
    cells, baseline = comparison.cells, comparison.baseline
    flops = [cell.flops for cell in (*comparison.sparse, *([baseline] if baseline else []))]
    equal = max(flops) <= (1 + TOLERANCE) ** 2 * min(flops)
    yield _Figure(
        "loss_against_parameters",
        f"Final loss against total parameters{' (sparse: equal active FLOPs)' if equal else ''}",
        "Small points are seeds (dense to the left of their mean, sparse to the right), large ones their "
        "means. Filled: sparse. Hollow: dense, of more FLOPs the larger they are. Dashed: a power law, where "
        "the seeds support one.",
        lambda axes: _against_parameters(axes, comparison),
    )
    if baseline is not None and any(d.low is not None for d in comparison.differences.values()):
        yield _Figure(
            "difference_to_dense",
            f"Difference of the final loss to {baseline.label}",
            "Mean over seeds, paired by seed, with 95 % intervals. Below zero is better.",
            lambda axes: _differences(axes, comparison),
        )
    curves = "Mean over seeds, from a third of the training on."
    yield _Figure(
        "loss_against_flops",
        "Loss against training FLOPs",
        curves,
        lambda axes: _curves(axes, cells, _flops_at, "training FLOPs"),
    )
    yield _Figure(
        "loss_against_time",
        "Loss against time",
        f"{curves} Tokens over the run's tokens per second, evaluation and saving not counted, on a machine "
        "that runs side by side share. Each curve's learning rate ends with it, so only ends compare fully.",
        lambda axes: _curves(axes, cells, _seconds_at, "time of the training steps (seconds)"),
    )
    yield _Figure(
        "speed",
        "Training speed",
        "Median over seeds, evaluation and saving not counted. Light: dense.",
        lambda axes: _bars(axes, cells, [cell.tokens_per_s for cell in cells], "tokens per second"),
    )
    for key, title in _HEALTH.items():
        values = [cell.mean(f"moe/{key}") or 0.0 for cell in comparison.sparse]
        if any(values):
            yield _Figure(
                key,
                f"Router health: {title[0].lower()}{title[1:]}",
                "Mean over the last tenth of the training and over seeds.",
                partial(_bars, cells=comparison.sparse, heights=values, label=title),
            )
    for key, title in _COST.items():
        costs = [cost for cell in cells if (cost := cell.cost(key)) is not None]
        if len(costs) == len(cells):
            fill = partial(_bars, cells=cells, heights=costs, label=title)
            yield _Figure(key, title, "Mean over seeds.", fill)


def _against_parameters(axes: Axes, comparison: Comparison) -> None:
    for name, cells, fill, side in (
        ("sparse", comparison.sparse, _INK, 1.03),
        ("dense", comparison.dense, "white", 0.97),
    ):
        style: dict[str, Any] = {"color": _INK, "markerfacecolor": fill}
        for number, cell in enumerate(cells):
            total = cell.counts.total / 1e6
            axes.plot([side * total] * len(cell.runs), list(cell.losses.values()), "o", markersize=3, **style)
            axes.plot(total, cell.mean_loss, "o", markersize=8, label=None if number else name, **style)
            place = (10, 7 if cell.is_dense else -14)
            axes.annotate(
                cell.label,
                (total, cell.mean_loss),
                textcoords="offset points",
                xytext=place,
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
    for curve in comparison.curves:
        if curve.key == "moe.num_experts":
            _line(axes, curve.cells, "-")
        if curve.law is not None and not curve.law.may_be_flat:
            at = np.geomspace(*_ends(curve.cells), 50)
            axes.plot(
                at / 1e6, curve.law.scale * at**curve.law.exponent.mean, "--", color="#888888", linewidth=1
            )
    _line(axes, comparison.dense, ":")
    axes.set(xscale="log", xlabel="total parameters (millions)", ylabel=_LOSS)
    lowest, highest = (total / 1e6 for total in _ends(comparison.cells))
    axes.set_xlim(lowest / 1.15, 1.8 * highest)  # room for the last label
    ticks = [1, 2, 5] if highest > 5 * lowest else range(1, 10)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _ends(cells: Sequence[CellResult]) -> tuple[int, int]:
    totals = [cell.counts.total for cell in cells]
    return min(totals), max(totals)


def _line(axes: Axes, cells: Sequence[CellResult], style: str) -> None:
    totals = [cell.counts.total / 1e6 for cell in cells]
    axes.plot(totals, [cell.mean_loss for cell in cells], style, color=_INK, linewidth=1.2, zorder=1)


def _differences(axes: Axes, comparison: Comparison) -> None:
    shown = [(label, d) for label, d in comparison.differences.items() if d.low is not None]
    axes.axhline(0, color=_INK, linewidth=1)
    for place, (_, difference) in enumerate(shown):
        assert difference.low is not None
        half = difference.mean - difference.low
        axes.errorbar(place, difference.mean, half, fmt="o", color=_INK, capsize=5)
        axes.annotate(
            f"{difference.mean:+.4f}",
            (place, difference.mean),
            textcoords="offset points",
            xytext=(8, -3),
            fontsize=8,
        )
    axes.set_xticks(range(len(shown)), [label for label, _ in shown], rotation=30, ha="right")
    axes.set_xlim(-0.5, len(shown))
    axes.set_ylabel("difference of validation loss (nats per token)")


def _flops_at(run: Run, cell: CellResult, step: int, tokens: int) -> float:
    return tokens * cell.counts.flops_per_token_train


def _seconds_at(run: Run, cell: CellResult, step: int, tokens: int) -> float:
    return tokens / run.summary["tokens_per_s"]


def _curves(
    axes: Axes, cells: Sequence[CellResult], place: Callable[[Run, CellResult, int, int], float], label: str
) -> None:
    for index, cell in enumerate(cells):
        points: dict[int, list[tuple[float, float]]] = {}
        for run in cell.runs.values():
            evaluated = [line for line in run.metrics if "eval/loss" in line]
            for line in evaluated:
                if line["step"] >= evaluated[-1]["step"] / 3:
                    at = place(run, cell, line["step"], line["tokens"])
                    points.setdefault(line["step"], []).append((at, line["eval/loss"]))
        common = [np.mean(some, axis=0) for _, some in sorted(points.items()) if len(some) == len(cell.runs)]
        x, y = np.array(common).T
        axes.plot(
            x,
            y,
            label=cell.label,
            markersize=5,
            color=plt.get_cmap("viridis")(0.85 * index / max(len(cells) - 1, 1)),
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_LINES[index % len(_LINES)],
            markerfacecolor="white" if cell.is_dense else None,
            zorder=3 if cell.is_dense else 2,
        )
    axes.set(xlabel=label, ylabel=_LOSS)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Axes, cells: Sequence[CellResult], heights: Sequence[float], label: str) -> None:
    colours = [_DENSE if cell.is_dense else _SPARSE for cell in cells]
    bars = axes.bar(range(len(cells)), heights, color=colours, edgecolor=_INK)
    axes.bar_label(
        bars, fmt=lambda height: f"{height:,.0f}" if height >= 100 else f"{height:.3g}", fontsize=8
    )
    axes.set_ylabel(label)
    axes.margins(y=0.1)
    axes.set_xticks(range(len(cells)), [cell.label for cell in cells], rotation=30, ha="right")
