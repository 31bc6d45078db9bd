"""`router.png`: what the routers of a run did."""

from pathlib import Path
from typing import Any

import numpy as np

_PANELS = {
    "max_vio": "MaxVio: largest load over the mean, less 1",
    "dead_experts": "experts without a token in the step",
    "load_entropy": "entropy of the loads (1: balanced)",
    "router_entropy": "entropy of a token's probabilities (nats)",
    "top1_margin": "difference of the two best probabilities",
    "logit_max": "largest router logit",
}


def plot_routers(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw figures of each MoE layer, and their mean, against steps, into the PNG `path`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # takes half a second, and is needed at the end only

    lines = [line for line in metrics if "moe/layers/max_vio" in line]
    steps = [line["step"] for line in lines]
    figure = Figure(figsize=(9, 8), dpi=100, layout="constrained")
    figure.suptitle(title)
    for axes, (name, label) in zip(figure.subplots(3, 2, sharex=True).flat, _PANELS.items(), strict=True):
        by_layer = np.array([line[f"moe/layers/{name}"] for line in lines]).T
        for number, values in enumerate(by_layer):
            color = colormaps["viridis"](number / max(len(by_layer) - 1, 1) * 0.9)
            axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.7)
        axes.plot(steps, by_layer.mean(0), color="black", linewidth=2)
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    figure.supxlabel(
        "step; a line for each MoE layer, the first one darkest; their mean in black", fontsize=9
    )
    figure.savefig(path)
