"""The contenders by name: our layer, its reference, a dense block, bare matrix products, other libraries."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from moe.benchmark.contenders import Contender, DenseContender, ModuleContender
from moe.benchmark.gemm_floor import GemmFloor
from moe.benchmark.layer_problem import LayerProblem, LayerShape
from moe.config import ConfigError
from moe.model.moe_layer import MoELayer

CONTENDERS = ("moe", "moe_reference", "dense", "gemm_floor", "deepspeed", "hf_eager", "hf_grouped_mm")


def check_names(names: Sequence[str]) -> None:
    """See whether there are such contenders here.

    Raises:
        ConfigError: a name is not known, or the library that it stands for is not installed.
    """
    for name in names:
        if name not in CONTENDERS:
            raise ConfigError("--contenders", f"{name!r} is not one of {', '.join(CONTENDERS)}")
        if name.startswith("hf_") and find_spec("transformers") is None:
            fix = "pip install -e '.[hf]', or leave it out of --contenders"
            raise ConfigError("--contenders", f"{name} needs transformers; {fix}")


def build_contender(name: str, problem: LayerProblem) -> Contender:
    """One of `CONTENDERS`, with the weights of the problem."""
    match name:
        case "moe":
            return ModuleContender(name, problem.layer, problem)
        case "moe_reference":
            return reference_of(problem)
        case "dense":
            return DenseContender(problem)
        case "gemm_floor":
            return GemmFloor(problem)
    from moe.benchmark import peers  # imports transformers and DeepSpeed

    if name == "deepspeed":
        return ModuleContender(name, peers.deepspeed_layer(problem), problem)
    return ModuleContender(name, peers.mixtral_block(problem, name.removeprefix("hf_")), problem)


def reference_of(problem: LayerProblem) -> ModuleContender:
    """Our layer on its plain autograd path: what the others have to compute."""
    with torch.device("meta"):
        layer = MoELayer(problem.shape.d_model, problem.shape.moe, expert_path="reference")
    layer.load_state_dict(problem.layer.state_dict(), assign=True)
    return ModuleContender("moe_reference", layer, problem)


def is_comparable(name: str, shape: LayerShape) -> bool:
    """Mixtral's block divides gate weights by their sum, which of a single one leaves the constant 1."""
    return shape.top_k > 1 or not name.startswith("hf_")
