"""`loss.png`: the loss curves of a run."""

from pathlib import Path
from typing import Any

import numpy as np


def plot_losses(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw the training and validation loss of `metrics.jsonl` against tokens, into the PNG `path`."""
    from matplotlib.figure import Figure  # takes half a second, and is needed at the end only

    train = [(line["tokens"], line["loss/lm"]) for line in metrics if "loss/lm" in line]
    evaluated = [(line["tokens"], line["eval/loss"]) for line in metrics if "eval/loss" in line]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    tokens, losses = np.array(train).T
    axes.plot(tokens / 1e6, losses, color="#9aa5b1", linewidth=1.2, label="training (one batch)")
    if evaluated:
        tokens, losses = np.array(evaluated).T
        label = f"validation ({losses[-1]:.3f} at the end)"
        axes.plot(tokens / 1e6, losses, "o-", color="#1f4e9c", linewidth=2, markersize=5, label=label)
    axes.set(title=title, xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
