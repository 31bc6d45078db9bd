"""The runs below a folder: how each stands, as a table and as curves."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.accounting.counts import ModelCounts, count_parameters
from moe.checkpoint.listing import list_checkpoints
from moe.config import Config, load_config
from moe.runs.metrics_log import read_metrics
from moe.runs.run_folder import RunFolder
from moe.tables import align, short

HEADER = (
    "run",
    "status",
    "experts",
    "parameters",
    "active",
    "tokens",
    "validation loss",
    "tokens/s",
    "last written",
)


@dataclass(frozen=True)
class ListedRun:
    """How a run stands.

    Attributes:
        name: its folder, relative to the one that was searched.
        status: `training`, `stopped`, `failed` or `finished`; a run that was killed is `stopped`.
        step: that was logged last; of a run that has stopped or failed, that of its newest checkpoint.
        tokens: that it was trained on up to there.
        loss: of the last evaluation, in nats per token; None before the first one.
        tokens_per_s: median over the last steps that were logged; None before the first one.
        written: when its metrics were written last, in seconds since the epoch.
    """

    name: str
    status: str
    step: int
    tokens: int
    loss: float | None
    tokens_per_s: float | None
    written: float
    config: Config
    counts: ModelCounts
    metrics: list[dict[str, Any]]


def list_runs(folder: Path) -> list[ListedRun]:
    """All runs in a folder and below it, by name. Runs that have not begun to train are left out."""
    found = (path.parent for path in sorted(folder.rglob("metrics.jsonl")))
    return [_look_at(path, folder) for path in found if (path / "config.yaml").exists()]


def _look_at(path: Path, root: Path) -> ListedRun:
    folder = RunFolder(path)
    config, metrics = load_config(folder.config), read_metrics(folder.metrics)
    status = "stopped"
    if folder.is_in_use():
        status = "training"
    elif folder.failure.exists():
        status = "failed"
    elif folder.summary.exists():
        status = "finished"
    train = [line for line in metrics if "loss/lm" in line]
    step = train[-1]["step"] if train else 0
    if status in ("stopped", "failed"):
        step = max((saved for saved, _ in list_checkpoints(folder.checkpoints)), default=0)
    speeds = [line["perf/tokens_per_s"] for line in train[-20:]]
    return ListedRun(
        name=str(path.relative_to(root)) if path != root else path.name,
        status=status,
        step=step,
        tokens=step * config.train.global_batch_size * config.data.seq_len,
        loss=next((line["eval/loss"] for line in reversed(metrics) if "eval/loss" in line), None),
        tokens_per_s=statistics.median_high(speeds) if speeds else None,
        written=folder.metrics.stat().st_mtime,
        config=config,
        counts=count_parameters(config),
        metrics=metrics,
    )


def table(runs: Sequence[ListedRun]) -> str:
    """One line per run."""
    return align([HEADER, *(_row(run) for run in runs)])


def _row(run: ListedRun) -> tuple[str, ...]:
    moe = run.config.moe
    where = "" if run.status == "finished" else f", step {run.step} of {run.config.train.steps}"
    return (
        run.name,
        run.status + where,
        "dense" if moe.is_dense else f"{moe.num_experts}, top-{moe.top_k}",
        short(run.counts.total),
        short(run.counts.active_all),
        short(run.tokens),
        "-" if run.loss is None else f"{run.loss:.4f}",
        "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)),
    )


def plot_runs(runs: Sequence[ListedRun], path: Path) -> None:
    """Draw the validation loss of all runs that have one against tokens, into the picture `path`."""
    from matplotlib.figure import Figure  # takes half a second

    figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for run in runs:
        evaluated = [(line["tokens"] / 1e6, line["eval/loss"]) for line in run.metrics if "eval/loss" in line]
        if evaluated:
            label = f"{run.name} ({evaluated[-1][1]:.3f})"
            axes.plot(*zip(*evaluated, strict=True), "o-", linewidth=1.6, markersize=4, label=label)
    axes.set(xlabel="training tokens (millions)", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, title="run (last loss)")
    figure.savefig(path)
