"""The speed of layers relative to a dense block, against the number of experts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_speeds(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a line per contender into the PNG `path`, and a panel for each number of tokens and top-k.

    Args:
        records: of `measure_layers`, with `dense` among the contenders.
        path: of the picture.
    """
    panels = list(dict.fromkeys((record["tokens"], record["top_k"]) for record in records))
    names = list(dict.fromkeys(record["contender"] for record in records))
    figure = Figure(figsize=(5.5 * len(panels), 4.5), dpi=120, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (tokens, top_k) in zip(grid[0], panels, strict=True):
        for color, name in enumerate(names):
            points = sorted(
                (record["num_experts"], record["relative_to_dense"])
                for record in records
                if (record["contender"], record["tokens"], record["top_k"]) == (name, tokens, top_k)
            )
            if points:
                style = "--" if name == "dense" else "o-"
                axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=name)
        counts = sorted({record["num_experts"] for record in records})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set(title=f"{tokens:,} tokens, top-{top_k}", xlabel="experts")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(bottom=0)  # of all panels, when all have their lines
    grid[0][0].set_ylabel("speed, forward and backward, relative to dense")
    grid[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
