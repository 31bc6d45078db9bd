"""The MoE layer against a loop over tokens in float64, written without any of its parts but the router."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Config, MoEConfig
from moe.dispatch.interface import TokenContext
from moe.model.moe_layer import MoELayer

_SHAPE = (2, 32)  # sequences and their length


def layer_error(config: Config, device: torch.device) -> float:
    """The largest relative error of the layer's gradients, over the hidden states and every parameter."""
    layer = MoELayer(config.model.d_model, config.moe, seed=config.run.seed).to(device)
    torch.manual_seed(0)
    hidden = torch.randn(*_SHAPE, config.model.d_model, device=device, requires_grad=True)
    upstream = torch.randn_like(hidden)
    ids, noise_keys = torch.arange(64, device=device).view(_SHAPE), torch.arange(2, device=device)
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}
    output, _ = layer(hidden, token_ids=ids, noise_keys=noise_keys)
    fast = torch.autograd.grad(output, list(inputs.values()), upstream, allow_unused=True)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    context = TokenContext(_SHAPE[1], ids.flatten(), noise_keys)
    by_loop = _naive_layer(exact, config.moe, _routes(exact, layer, config.moe, context))
    slow = torch.autograd.grad(by_loop, list(exact.values()), upstream.double(), allow_unused=True)
    pairs = [(got, want) for got, want in zip(fast, slow, strict=True) if want is not None and want.any()]
    return max(float((got - want).norm() / want.norm()) for got, want in pairs)


def _routes(
    exact: dict[str, Tensor], layer: MoELayer, moe: MoEConfig, context: TokenContext
) -> Iterator[tuple[Tensor, list[int]]]:
    """Each token's gate weights (K,) and experts: of `topk` by its definition, else by the layer's router."""
    rows = exact["hidden"].flatten(0, 1)
    if moe.router != "topk":
        prefix = "router."
        weights = {name.removeprefix(prefix): exact[name] for name in exact if name.startswith(prefix)}
        routing = torch.func.functional_call(layer.router, weights, (rows, context))
        yield from zip(routing.gate_weights, routing.expert_indices.tolist(), strict=True)
        return
    for x in rows:
        best = (exact["router.weight"] @ x).softmax(0).topk(moe.top_k)
        gates = best.values / best.values.sum() if moe.normalize_gate_weights else best.values
        yield gates * moe.route_scale, best.indices.tolist()


def _naive_layer(
    exact: dict[str, Tensor], moe: MoEConfig, routes: Iterator[tuple[Tensor, list[int]]]
) -> Tensor:
    def feed_forward(x: Tensor, *weights: Tensor) -> Tensor:
        gate, up, down = weights
        return (F.silu(x @ gate) * (x @ up)) @ down

    parts = ("w_gate", "w_up", "w_down")
    experts = list(zip(*(exact[f"experts.{part}"].unbind(0) for part in parts), strict=True))
    rows = []
    for x, (gates, chosen) in zip(exact["hidden"].flatten(0, 1), routes, strict=True):
        row = torch.zeros_like(x)
        for gate, expert in zip(gates, chosen, strict=True):
            if expert < moe.num_experts:  # the number of experts stands for none
                row = row + gate * feed_forward(x, *experts[expert])
        if moe.num_shared_experts:
            shared = feed_forward(x, *(exact[f"shared_experts.{part}"] for part in parts))
            weight = exact.get("shared_gate.weight")
            row = row + (shared if weight is None else shared * (weight[0] @ x).sigmoid())
        rows.append(row)
    return torch.stack(rows).view_as(exact["hidden"])
