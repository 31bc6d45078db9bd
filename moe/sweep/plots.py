"""Pictures of a sweep; every one has its units, and is read without colour as well."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from moe.sweep.findings import CellResult, Findings, Run

_MARKERS, _LINES = "osD^vP*X", ("-", "--", "-.", ":")
_INK, _SPARSE, _DENSE = "#222222", "#7f9fca", "#dddddd"
_LOSS = "validation loss (nats per token)"
_HEALTH = {
    "moe/load_imbalance": "Load of the busiest expert over the mean",
    "moe/router_entropy": "Entropy of the router (nats)",
    "moe/dead_experts": "Experts without a token, summed over layers",
    "moe/dropped_fraction": "Assignments dropped by capacity (fraction)",
}


def draw(findings: Findings, folder: Path, suffix: str) -> list[tuple[Path, str]]:
    """Draw everything that the cells have.

    Args:
        findings: to show.
        folder: of the PNGs.
        suffix: of their names.

    Returns:
        The PNGs with their captions.
    """
    cells, sparse = findings.cells, [cell for cell in findings.cells if not cell.is_dense]
    wanted: list[tuple[str, str, str, Callable[[Axes], None]]] = [
        (
            "loss_against_parameters",
            "Final loss against total parameters",
            "Small points are seeds, lines join their means. Filled: active FLOPs equal within 1 %; hollow: "
            "dense models, which need more FLOPs the larger they are. Dashed: the power law, if any.",
            lambda axes: _against_parameters(axes, findings),
        ),
        (
            "loss_against_flops",
            "Loss against training FLOPs",
            "Mean over seeds, from a third of the training on.",
            lambda axes: _curves(axes, cells, _flops_at, "training FLOPs"),
        ),
        (
            "loss_against_time",
            "Loss against time",
            "Mean over seeds, from a third of the training on: what equal time buys on this machine.",
            lambda axes: _curves(axes, cells, _seconds_at, "time of the training steps (seconds)"),
        ),
        (
            "speed",
            "Training speed",
            "Median over seeds, without evaluation and checkpoints. Dense models are lighter.",
            lambda axes: _bars(axes, cells, lambda cell: cell.tokens_per_s, "tokens per second"),
        ),
    ]
    if any(difference.low is not None for difference in findings.differences.values()):
        wanted.insert(
            1,
            (
                "difference_to_dense",
                "Difference of the final loss to the dense model of equal FLOPs",
                "Mean over seeds, paired by seed, with 95 % intervals. Below zero is better.",
                lambda axes: _differences(axes, findings),
            ),
        )
    for key, title in _HEALTH.items():
        if any(cell.mean(key) for cell in sparse):
            wanted.append(
                (
                    key.rpartition("/")[2],
                    f"Router health: {title[0].lower()}{title[1:]}",
                    "Mean over the last tenth of the training and over seeds.",
                    partial(_bars, cells=sparse, value=methodcaller("mean", key), label=title),
                )
            )
    pictures = []
    for name, title, caption, fill in wanted:
        figure, axes = plt.subplots(figsize=(7.2, 4.6), dpi=130, layout="constrained")
        fill(axes)
        axes.set_title(title, fontsize=12)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        path = folder / f"{name}{suffix}.png"
        figure.savefig(path)
        plt.close(figure)
        pictures.append((path, f"{title}. {caption}"))
    return pictures


def _against_parameters(axes: Axes, findings: Findings) -> None:
    dense = [cell for cell in findings.cells if cell.is_dense]
    sparse = [cell for cell in findings.cells if not cell.is_dense]
    for name, cells, fill, line in (("sparse", sparse, _INK, "-"), ("dense", dense, "white", ":")):
        totals = [cell.ledger.total / 1e6 for cell in cells]
        style: dict[str, Any] = {"color": _INK, "markerfacecolor": fill}
        axes.plot(totals, [cell.mean_loss for cell in cells], "o" + line, label=name, **style)
        for total, cell in zip(totals, cells, strict=True):
            axes.plot([total] * len(cell.runs), list(cell.losses.values()), ".", markersize=4, **style)
            axes.annotate(
                cell.label,
                (total, cell.mean_loss),
                textcoords="offset points",
                xytext=(7, 7 if cell.is_dense else -12),
                fontsize=8,
            )
    if findings.law is not None:
        totals = [cell.ledger.total / 1e6 for cell in findings.cells]
        at = np.geomspace(min(totals), max(totals), 50)
        losses = findings.law.scale * (at * 1e6) ** findings.law.exponent.mean
        axes.plot(at, losses, "--", color="#888888", linewidth=1, label="power law at equal active FLOPs")
    axes.set(xscale="log", xlabel="total parameters (millions)", ylabel=_LOSS)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    lowest, highest = axes.get_xlim()
    axes.set_xlim(lowest, 1.4 * highest)  # room for the last label
    axes.legend(frameon=False)


def _differences(axes: Axes, findings: Findings) -> None:
    shown = [(label, d) for label, d in findings.differences.items() if d.low is not None]
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
    return tokens * cell.ledger.flops_per_token_train


def _seconds_at(run: Run, cell: CellResult, step: int, tokens: int) -> float:
    return step * statistics.mean(line["perf/step_s"] for line in run.metrics if line.get("perf/step_s"))


def _curves(
    axes: Axes,
    cells: Sequence[CellResult],
    place: Callable[[Run, CellResult, int, int], float],
    label: str,
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
        )
    axes.set(xlabel=label, ylabel=_LOSS)
    axes.legend(frameon=False, fontsize=8)


def _bars(axes: Axes, cells: Sequence[CellResult], value: Callable[[CellResult], float], label: str) -> None:
    heights = [value(cell) for cell in cells]
    colours = [_DENSE if cell.is_dense else _SPARSE for cell in cells]
    bars = axes.bar([cell.label for cell in cells], heights, color=colours, edgecolor=_INK)
    axes.bar_label(
        bars, fmt=lambda height: f"{height:,.0f}" if height >= 100 else f"{height:.3g}", fontsize=8
    )
    axes.set_ylabel(label)
    axes.set_ylim(top=1.1 * max(*heights, math.ulp(1.0)))
    axes.set_xticks(range(len(cells)), [cell.label for cell in cells], rotation=30, ha="right")
