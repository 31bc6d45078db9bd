"""Initial weights, each a function of the seed and of the parameter's name alone."""

import hashlib
import math

import torch
from torch import nn

from moe.model.attention import Attention
from moe.model.experts import GroupedExperts
from moe.model.parameter_roles import parameter_roles

_SMALL_STD = 0.02  # of embeddings and routers


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter; each is a function of `(seed, name)`, an expert's of `(seed, name, expert id)`.

    So two models that share a name share its weights, whatever else differs: the number of experts, the
    topology, the order of construction. Normal, cut at three standard deviations: 1 / sqrt(fan in) for
    matrices, divided by sqrt(2 * n_layers) where they write to the residual stream (Radford et al. 2019);
    0.02 for embeddings and routers; norms start at 1. Parameters on the meta device are left alone.

    Args:
        model: a `Transformer` or any part of one.
        seed: `run.seed`.
    """
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    residual_scale = 1 / math.sqrt(2 * max(len(attentions), 1))
    to_residual = {id(attention.output) for attention in attentions}
    for prefix, module in model.named_modules():
        for leaf, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if weight.is_meta or name not in parameters:
                continue
            if roles[name] in ("norm", "bias"):
                weight.fill_(1.0 if roles[name] == "norm" else 0.0)
                continue
            if roles[name] in ("embedding", "router"):
                std = _SMALL_STD
            else:  # a Linear's weight is (out, in), those of SwiGLU and experts are (..., in, out)
                std = 1 / math.sqrt(weight.shape[-1 if isinstance(module, nn.Linear) else -2])
            if leaf == "w_down" or id(module) in to_residual:
                std *= residual_scale
            is_stacked = isinstance(module, GroupedExperts)
            parts = zip(module.expert_ids, weight.unbind(0), strict=True) if is_stacked else [(0, weight)]
            for expert, part in parts:
                values = torch.empty(part.shape, dtype=torch.float32)
                generator = torch.Generator().manual_seed(_derive_seed(seed, name, expert))
                nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)
                part.copy_(values)


def _derive_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
