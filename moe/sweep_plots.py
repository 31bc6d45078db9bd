"""Pictures of a sweep; every one has its units, and is read without colour as well."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from moe.sweep_report import Cell, Findings, Run

_MARKERS, _LINES = "osD^vP*X", ("-", "--", "-.", ":")
LOSS = "validation loss (nats per token)"


def draw(findings: Findings, folder: Path) -> list[tuple[Path, str]]:
    """Draw everything that the cells have; the PNGs with their captions."""
    sparse = [cell for cell in findings.cells if not cell.is_dense]
    wanted: list[tuple[str, str, Callable[[Axes], None]]] = [
        (
            "loss_against_parameters",
            "Final loss against total parameters. Points are seeds, lines join means; hollow ones are dense.",
            lambda axes: _against_parameters(axes, findings.cells),
        ),
        (
            "loss_against_flops",
            "Loss against training FLOPs, mean over seeds.",
            lambda axes: _curves(axes, findings.cells, _flops_at, "training FLOPs"),
        ),
        (
            "loss_against_time",
            "Loss against the time of the training steps, mean over seeds. What equal seconds buy here.",
            lambda axes: _curves(axes, findings.cells, _seconds_at, "seconds of training steps"),
        ),
        (
            "speed",
            "Tokens per second, median over seeds.",
            lambda axes: _bars(axes, findings.cells, lambda cell: _speed(cell), "tokens per second"),
        ),
    ]
    if sparse:
        health = (
            ("moe/load_imbalance", "busiest expert's load over the mean"),
            ("moe/router_entropy", "entropy of the router (nats)"),
            ("moe/dead_experts", "experts without a token, over all layers"),
        )
        for key, title in health:
            wanted.append(
                (
                    key.rpartition("/")[2],
                    f"Router health: {title}, mean of the last lines of the log, over seeds.",
                    lambda axes, key=key, title=title: _bars(
                        axes, sparse, lambda c: c.mean(key) or 0.0, title
                    ),
                )
            )
    pictures = []
    for name, caption, fill in wanted:
        figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
        fill(axes)
        axes.set_title(caption.split(".")[0], fontsize=11)
        axes.grid(alpha=0.3)
        path = folder / f"{name}.png"
        figure.savefig(path)
        plt.close(figure)
        pictures.append((path, caption))
    return pictures


def _style(index: int, of: int) -> dict[str, Any]:
    return {
        "color": plt.get_cmap("viridis")(0.85 * index / max(of - 1, 1)),
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index % len(_LINES)],
    }


def _against_parameters(axes: Axes, cells: Sequence[Cell]) -> None:
    for dense, label in ((False, "sparse"), (True, "dense")):
        some = [cell for cell in cells if cell.is_dense == dense]
        if not some:
            continue
        totals = [cell.ledger.total / 1e6 for cell in some]
        means = [statistics.mean(cell.losses.values()) for cell in some]
        fill = "none" if dense else "#1f4e9c"
        axes.plot(
            totals,
            means,
            ":" if dense else "-",
            color="#777777" if dense else "#1f4e9c",
            label=f"{label}, mean",
        )
        points = [
            (total, loss) for total, cell in zip(totals, some, strict=True) for loss in cell.losses.values()
        ]
        axes.scatter(
            *zip(*points, strict=True),
            facecolors=fill,
            edgecolors="#222222",
            zorder=3,
            label=f"{label}, seeds",
        )
        for total, mean, cell in zip(totals, means, some, strict=True):
            axes.annotate(cell.label, (total, mean), textcoords="offset points", xytext=(6, 6), fontsize=8)
    axes.set(xscale="log", xlabel="total parameters (millions)", ylabel=LOSS)
    axes.legend(frameon=False)


def _flops_at(run: Run, cell: Cell, step: int, tokens: int) -> float:
    return tokens * cell.ledger.flops_per_token_train


def _seconds_at(run: Run, cell: Cell, step: int, tokens: int) -> float:
    return step * statistics.mean(line["perf/step_s"] for line in run.metrics if "perf/step_s" in line)


def _curves(
    axes: Axes, cells: Sequence[Cell], place: Callable[[Run, Cell, int, int], float], label: str
) -> None:
    for index, cell in enumerate(cells):
        curves = [
            [
                (place(run, cell, line["step"], line["tokens"]), line["eval/loss"])
                for line in run.metrics
                if "eval/loss" in line
            ]
            for run in cell.runs.values()
        ]
        x, y = np.mean(np.array(curves), axis=0).T
        axes.plot(x, y, label=cell.label, markersize=5, **_style(index, len(cells)))
    axes.set(xlabel=label, ylabel=LOSS)
    axes.legend(frameon=False, fontsize=8)


def _speed(cell: Cell) -> float:
    return statistics.median(run.summary["tokens_per_s"] for run in cell.runs.values())


def _bars(axes: Axes, cells: Sequence[Cell], value: Callable[[Cell], float], label: str) -> None:
    heights = [value(cell) for cell in cells]
    colours = ["#dddddd" if cell.is_dense else "#7f9fca" for cell in cells]
    bars = axes.bar([cell.label for cell in cells], heights, color=colours, edgecolor="#222222")
    axes.bar_label(bars, fmt=lambda height: f"{height:,.4g}", fontsize=8)
    axes.set_ylabel(label)
    axes.tick_params(axis="x", rotation=30)
