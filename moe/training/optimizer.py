"""Which parameters are decayed, and the learning rate of every step."""

import math
from typing import Any

from torch import nn

from moe.config import Config
from moe.model.parameter_roles import parameter_roles


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: matrices are decayed, norms and biases are not."""
    groups: dict[str, list[nn.Parameter]] = {"decayed": [], "not_decayed": []}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        groups["not_decayed" if roles[name] in ("norm", "bias") else "decayed"].append(parameter)
    decays = {"decayed": weight_decay, "not_decayed": 0.0}
    return [{"name": name, "params": params, "weight_decay": decays[name]} for name, params in groups.items()]


def learning_rate(config: Config, step: int) -> float:
    """Linear warm-up to `optim.lr`, then a cosine to `optim.lr * optim.min_lr_ratio` at the last step.

    Args:
        config: its section `optim`, and `train.steps`.
        step: 0 for the first optimizer step.
    """
    optim, warm_up = config.optim, config.warmup_steps
    if step < warm_up:
        return optim.lr * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, config.train.steps - 1 - warm_up)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)
