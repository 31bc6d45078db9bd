"""Which parameters are decayed, and the learning rate of every step."""

import math
from typing import Any

from torch import nn

from moe.config import Config
from moe.model.parameter_roles import parameter_roles


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group: matrices are decayed, norms and biases are not.

    A group is of one dtype, as DeepSpeed makes one flat tensor of it.
    """
    groups: dict[str, dict[str, Any]] = {}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        is_decayed = roles[name] not in ("norm", "bias")
        key = f"{'decayed' if is_decayed else 'not_decayed'}, {parameter.dtype}"
        group = {"name": key, "params": [], "weight_decay": weight_decay if is_decayed else 0.0}
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


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
