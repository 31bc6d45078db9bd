"""Which parameters are decayed, and the learning rate of every step."""

import math
from typing import Any

from torch import nn

from moe.config.schema import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: matrices are decayed, norms and biases are not.

    Decided by name, not by dimension: a stacked norm is 2-D and still a norm.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        is_plain = "norm" in name or name.endswith("bias")
        (plain if is_plain else decayed).append(parameter)
    return [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]


def parameter_family(name: str) -> str:
    """`router`, `experts` (those that the router chooses among) or `dense` (everything else), by name."""
    if ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "dense"


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up to `lr`, then a cosine to `lr * min_lr_ratio` at the last step.

    Args:
        step: 0 for the first optimizer step.
        steps: `train.steps`.
        optim: the section `optim`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)
