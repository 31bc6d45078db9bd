"""The figures of an ablation. They state their units and can be read without color."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from moe.ablation.cells import TOLERANCE
from moe.ablation.comparison import Comparison
from moe.ablation.results import CellResult, training_seconds
from moe.tables import plain

_MARKERS, _LINES = "osD^vP*X", ("-", "--", "-.", ":")
_INK, _SPARSE, _DENSE = "#222222", "#7f9fca", "#dddddd"
_BOX: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
_NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
_SPEED, _LOSS = "tokens per second", "validation loss (nats per token)"
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


def draw_figures(comparison: Comparison, folder: Path, suffix: str) -> list[tuple[Path, str]]:
    """Draw all figures for which the cells have data into PNG files; returns these with their captions."""
    pictures = []
    for name, title, caption, draw in _figures(comparison):
        figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, fontsize=12)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        path = folder / f"{name}{suffix}.png"
        figure.savefig(path)
        pictures.append((path, f"{title}. {caption}"))
    return pictures


def _figures(comparison: Comparison) -> Iterator[tuple[str, str, str, Callable[[Axes], None]]]:
    """File name, title, caption, and the function that draws the figure."""
    cells, sparse, baseline = comparison.cells, comparison.sparse, comparison.baseline
    flops = [cell.flops for cell in (*sparse, *([baseline] if baseline else []))]
    race = ", in equal time" if comparison.is_race else ""
    alike = max(flops) <= (1 + TOLERANCE) ** 2 * min(flops)
    equal = race or (" (sparse: equal active FLOPs)" if alike else "")
    caption = (
        "Small points: single seeds (dense models left of their mean, sparse models right of it). Large "
        "points: means over seeds. Filled: sparse models. Hollow: dense models, whose FLOPs grow with their "
        "size. Dashed: a power law, drawn if its exponent is significantly below zero."
    )
    draw = partial(_against_parameters, comparison=comparison)
    yield "loss_against_parameters", f"Final loss against total parameters{equal}", caption, draw
    if baseline is not None and any(d.low is not None for d in comparison.differences.values()):
        title = f"Difference of the final loss to {baseline.label}{race}"
        caption = "Mean over seeds, paired by seed, with 95 % intervals. Below zero is better."
        yield "difference_to_dense", title, caption, partial(_differences, comparison=comparison)
    caption = "Mean over seeds, without the first third of the training."
    draw = partial(_curves, cells=cells, over_time=False)
    yield "loss_against_flops", "Loss against training FLOPs", caption, draw
    caption += (
        " Time is the sum of the measured times of the training steps, without evaluation and saving. Runs "
        "trained at the same time shared the machine. "
    )
    schedule = "The learning rate decays until each curve ends, so only the ends are fully comparable."
    if race:
        schedule = "All were planned to end at the dotted line; until then they have equal learning rates."
    draw = partial(_curves, cells=cells, over_time=True)
    yield "loss_against_time", "Loss against time", caption + schedule, draw
    caption = "Median over seeds, without evaluation and saving. Light bars: dense models."
    speeds = [cell.tokens_per_s for cell in cells]
    yield "speed", "Training speed", caption, partial(_bars, cells=cells, heights=speeds, label=_SPEED)
    for key, label in _HEALTH.items():
        values = [cell.mean(f"moe/{key}") or 0.0 for cell in sparse]
        if any(values):
            title = f"Router health: {label[0].lower()}{label[1:]}"
            caption = "Mean over the last tenth of the training and over seeds."
            yield key, title, caption, partial(_bars, cells=sparse, heights=values, label=label)
    for key, label in _COST.items():
        costs = [cost for cell in cells if (cost := cell.cost(key)) is not None]
        if len(costs) == len(cells):
            yield key, label, "Mean over seeds.", partial(_bars, cells=cells, heights=costs, label=label)


def _against_parameters(axes: Axes, comparison: Comparison) -> None:
    kinds = (("sparse", comparison.sparse, _INK, 1.03), ("dense", comparison.dense, "white", 0.97))
    for name, cells, fill, side in kinds:
        style: dict[str, Any] = {"color": _INK, "markerfacecolor": fill}
        for number, cell in enumerate(cells):
            total = cell.counts.total / 1e6
            axes.plot([side * total] * len(cell.runs), list(cell.losses.values()), "o", markersize=3, **style)
            axes.plot(total, cell.mean_loss, "o", markersize=8, label=None if number else name, **style)
            offset = (10, 7 if cell.is_dense else -14)
            axes.annotate(cell.label, (total, cell.mean_loss), xytext=offset, bbox=_BOX, **_NOTE)
    for curve in comparison.curves:
        if curve.key == "moe.num_experts":
            _line(axes, curve.cells, "-")
        if curve.law is not None and not curve.law.may_be_flat:
            x = np.geomspace(*_ends(curve.cells), 50)
            y = curve.law.scale * x**curve.law.exponent.mean
            axes.plot(x / 1e6, y, "--", color="#888888", linewidth=1)
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
    differences = comparison.differences.items()
    shown = [(label, d.mean, d.mean - d.low) for label, d in differences if d.low is not None]
    axes.axhline(0, color=_INK, linewidth=1)
    for place, (_, mean, half) in enumerate(shown):
        axes.errorbar(place, mean, half, fmt="o", color=_INK, capsize=5)
        axes.annotate(f"{mean:+.4f}", (place, mean), xytext=(8, -3), **_NOTE)
    axes.set_xticks(range(len(shown)), [label for label, *_ in shown], rotation=30, ha="right")
    axes.set_xlim(-0.5, len(shown))
    axes.set_ylabel("difference of validation loss (nats per token)")


def _curves(axes: Axes, cells: Sequence[CellResult], over_time: bool) -> None:
    """Loss against the time of the training steps, or against training FLOPs."""
    for index, cell in enumerate(cells):
        points: dict[int, list[tuple[float, float]]] = {}
        for run in cell.runs.values():
            seconds = training_seconds(run.metrics)
            evaluated = [line for line in run.metrics if "eval/loss" in line]
            for line in evaluated:
                if line["step"] >= evaluated[-1]["step"] / 3:
                    x = (
                        seconds[line["step"]]
                        if over_time
                        else line["tokens"] * cell.counts.flops_per_token_train
                    )
                    points.setdefault(line["step"], []).append((x, line["eval/loss"]))
        common = [np.mean(some, axis=0) for _, some in sorted(points.items()) if len(some) == len(cell.runs)]
        axes.plot(
            *np.array(common).T,
            label=cell.label,
            markersize=5,
            color=colormaps["viridis"](0.85 * index / max(len(cells) - 1, 1)),
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=_LINES[index % len(_LINES)],
            markerfacecolor="white" if cell.is_dense else None,
            zorder=3 if cell.is_dense else 2,
        )
    planned = [seconds for cell in cells if (seconds := cell.planned_seconds) is not None]
    if over_time and planned:
        axes.axvline(max(planned), color=_INK, linestyle=":", linewidth=1, label="planned end")
    label = "time of the training steps (seconds)" if over_time else "training FLOPs"
    axes.set(xlabel=label, ylabel=_LOSS)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Axes, cells: Sequence[CellResult], heights: Sequence[float], label: str) -> None:
    colors = [_DENSE if cell.is_dense else _SPARSE for cell in cells]
    bars = axes.bar(range(len(cells)), heights, color=colors, edgecolor=_INK)
    axes.bar_label(bars, fmt=plain, fontsize=8)
    axes.set_ylabel(label)
    axes.margins(y=0.1)
    axes.set_xticks(range(len(cells)), [cell.label for cell in cells], rotation=30, ha="right")
