"""The MoE layer against a loop over tokens in float64, written without any of its parts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.config import Config
from moe.model.moe_layer import MoELayer


def layer_error(config: Config, device: torch.device) -> float:
    """The largest relative error of the layer's gradients, over the hidden states and every parameter."""
    layer = MoELayer(config.model.d_model, config.moe, seed=config.run.seed).to(device)
    torch.manual_seed(0)
    hidden = torch.randn(2, 32, config.model.d_model, device=device, requires_grad=True)
    upstream = torch.randn_like(hidden)
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}
    fast = torch.autograd.grad(layer(hidden)[0], list(inputs.values()), upstream)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    slow = torch.autograd.grad(_naive_layer(exact, config), list(exact.values()), upstream.double())
    pairs = [(got, want) for got, want in zip(fast, slow, strict=True) if want.any()]
    return max(float((got - want).norm() / want.norm()) for got, want in pairs)


def _naive_layer(exact: dict[str, Tensor], config: Config) -> Tensor:
    def feed_forward(x: Tensor, *weights: Tensor) -> Tensor:
        gate, up, down = weights
        return (F.silu(x @ gate) * (x @ up)) @ down

    parts = ("w_gate", "w_up", "w_down")
    experts = list(zip(*(exact[f"experts.{part}"].unbind(0) for part in parts), strict=True))
    rows = []
    for x in exact["hidden"].flatten(0, 1):
        best = (exact["router.weight"] @ x).softmax(0).topk(config.moe.top_k)
        scale = best.values.sum() if config.moe.normalize_gate_weights else 1.0
        row = torch.zeros_like(x)
        for gate, expert in zip(best.values / scale, best.indices.tolist(), strict=True):
            row = row + gate * feed_forward(x, *experts[expert])
        if config.moe.num_shared_experts:
            row = row + feed_forward(x, *(exact[f"shared_experts.{part}"] for part in parts))
        rows.append(row)
    return torch.stack(rows).view_as(exact["hidden"])
