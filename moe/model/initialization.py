"""Initial weights, each a function of the seed and of the parameter's name alone."""

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from moe.model.attention import Attention
from moe.model.experts import GroupedExperts
from moe.model.parameter_roles import parameter_roles

_SMALL_STD = 0.02  # of embeddings and routers


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Fill every parameter with its value of `initial_weights`; those on the meta device are left alone.

    Args:
        model: a `Transformer` or any part of one.
        seed: `run.seed`.

    Raises:
        ValueError: the seed is no integer.
    """
    if not isinstance(seed, int):
        raise ValueError(f"seed should be an integer, got {seed!r}")
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for _, parameter, values in initial_weights(model, seed):
        parameter.copy_(values)


def initial_weights(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Every parameter with its name and its initial values, in fp32 on CPU, whatever it holds now.

    Each is a function of `(seed, name)`, an expert's of `(seed, name, expert id)`. So two models that share a
    name share its weights, whatever else differs: the number of experts, the topology, the order of
    construction. Normal, cut at three standard deviations: 1 / sqrt(fan in) for matrices, divided by
    sqrt(2 * n_layers) where they write to the residual stream (Radford et al. 2019); 0.02 for embeddings and
    routers; norms start at 1.
    """
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    residual_scale = 1 / math.sqrt(2 * max(len(attentions), 1))
    to_residual = {id(attention.output) for attention in attentions}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # the numbers of one part come in sequence
        for prefix, module in model.named_modules():
            for leaf, weight in module.named_parameters(recurse=False):
                name = f"{prefix}.{leaf}" if prefix else leaf
                if name not in parameters:
                    continue
                if roles[name] in ("norm", "bias"):
                    yield name, weight, torch.full(weight.shape, 1.0 if roles[name] == "norm" else 0.0)
                    continue
                if roles[name] in ("embedding", "router"):
                    std = _SMALL_STD
                else:  # a Linear's weight is (out, in), those of SwiGLU and experts are (..., in, out)
                    std = 1 / math.sqrt(weight.shape[-1 if isinstance(module, nn.Linear) else -2])
                if leaf == "w_down" or id(module) in to_residual:
                    std *= residual_scale
                values = torch.empty(weight.shape, dtype=torch.float32)
                is_stacked = isinstance(module, GroupedExperts)
                parts = zip(module.expert_ids, values.unbind(0), strict=True) if is_stacked else [(0, values)]
                fill = partial(_fill_normal, seed, name, std)
                list(pool.map(lambda part, fill=fill: fill(*part), parts))
                yield name, weight, values


def _fill_normal(seed: int, name: str, std: float, expert: int, values: Tensor) -> None:
    generator = torch.Generator().manual_seed(_derive_seed(seed, name, expert))
    nn.init.trunc_normal_(values, std=std, a=-3 * std, b=3 * std, generator=generator)


def _derive_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
