"""Sparse mixture-of-experts language models, from one layer to a trained run.

These names are loaded when they are first used, so that `import moe` and counting need no torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.accounting.counts import ModelCounts, count_parameters
    from moe.config import (
        Config,
        ConfigError,
        DataConfig,
        ModelConfig,
        MoEConfig,
        RunConfig,
        TrainConfig,
        load_config,
    )
    from moe.dispatch.interface import RouterOutput, TokenContext
    from moe.inference.generation import Sampling, generate, stream
    from moe.inference.perplexity import Prediction, predict
    from moe.inference.trained_run import TrainedRun, load_run
    from moe.model.moe_layer import MoEAux, MoELayer
    from moe.model.router import Router
    from moe.model.transformer import Transformer
    from moe.training.loss import TrainingLoss, training_loss

__all__ = [  # a list in full, for type checkers
    "Config", "ConfigError", "DataConfig", "MoEAux", "MoEConfig", "MoELayer", "ModelConfig", "ModelCounts",
    "Prediction", "Router", "RouterOutput", "RunConfig", "Sampling", "TokenContext", "TrainConfig",
    "TrainedRun", "TrainingLoss", "Transformer", "count_parameters", "generate", "load_config", "load_run",
    "predict", "stream", "training_loss",
]  # fmt: skip
_HOMES = {
    "moe.accounting.counts": ["ModelCounts", "count_parameters"],
    "moe.config": [
        "Config", "ConfigError", "DataConfig", "ModelConfig", "MoEConfig", "RunConfig", "TrainConfig",
        "load_config",
    ],
    "moe.dispatch.interface": ["RouterOutput", "TokenContext"],
    "moe.inference.generation": ["Sampling", "generate", "stream"],
    "moe.inference.perplexity": ["Prediction", "predict"],
    "moe.inference.trained_run": ["TrainedRun", "load_run"],
    "moe.model.moe_layer": ["MoEAux", "MoELayer"],
    "moe.model.router": ["Router"],
    "moe.model.transformer": ["Transformer"],
    "moe.training.loss": ["TrainingLoss", "training_loss"],
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("gatework")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'moe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
