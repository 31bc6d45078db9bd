"""Sparse mixture-of-experts language models, from one layer to a trained run.

These names are loaded when they are first used, so that `import moe` and counting need no torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.accounting.counts import ModelCounts, count_parameters
    from moe.config import Config, ConfigError, MoEConfig, load_config
    from moe.dispatch.interface import RouterOutput
    from moe.inference.generation import Sampling, generate, stream
    from moe.inference.trained_run import TrainedRun, load_run
    from moe.model.moe_layer import MoEAux, MoELayer
    from moe.model.router import Router
    from moe.model.transformer import Transformer
    from moe.training.loss import TrainingLoss, training_loss

_HOMES = {
    "moe.accounting.counts": ["ModelCounts", "count_parameters"],
    "moe.config": ["Config", "ConfigError", "MoEConfig", "load_config"],
    "moe.dispatch.interface": ["RouterOutput"],
    "moe.inference.generation": ["Sampling", "generate", "stream"],
    "moe.inference.trained_run": ["TrainedRun", "load_run"],
    "moe.model.moe_layer": ["MoEAux", "MoELayer"],
    "moe.model.router": ["Router"],
    "moe.model.transformer": ["Transformer"],
    "moe.training.loss": ["TrainingLoss", "training_loss"],
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("gatework")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'moe' has no attribute {name!r}")
