"""Small transformers, and models on a CUDA device that does not exist."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe.config import parse_config
from moe.model.grouped_swiglu import ExpertPath
from moe.model.moe_layer import MoELayer
from moe.model.transformer import Block, Transformer

_Model = TypeVar("_Model", bound=nn.Module)

SMALL: dict[str, dict[str, Any]] = {
    "model": {"d_model": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab_size": 50},
    "moe": {"num_experts": 4, "top_k": 2, "d_ff_expert": 32},
}


def make_model(seed: int = 0, path: ExpertPath | None = None, **sections: dict[str, Any]) -> Transformer:
    """A transformer of `SMALL`, with the keys of some sections changed."""
    sections = {"run": {"seed": seed}} | sections
    merged = {name: SMALL.get(name, {}) | sections.get(name, {}) for name in {*SMALL, *sections}}
    return Transformer(parse_config(merged), expert_path=path)


def block_of(model: Transformer, layer: int) -> Block:
    """One of the blocks, with its type."""
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block


def moe_of(model: Transformer, layer: int) -> MoELayer:
    """The MoE layer of a sparse block."""
    ffn = block_of(model, layer).ffn
    assert isinstance(ffn, MoELayer)
    return ffn


def gradient_of(weight: Tensor) -> Tensor:
    """Its gradient, which there must be."""
    assert weight.grad is not None
    return weight.grad


def on_fake_cuda(make: Callable[[], _Model], dtype: torch.dtype) -> _Model:
    """A model with empty parameters on CUDA, within FakeTensorMode."""
    with torch.device("meta"):  # a CPU build cannot run the initialisers of torch.nn on fake CUDA tensors
        model = make()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device="cuda")
            setattr(module, name, nn.Parameter(empty))
    return model
