"""What all contenders of one shape are given: weights, tokens, and the gradient of the output.

Shape suffixes: T tokens, K experts per token, E experts, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from moe.config import ConfigError, MoEConfig
from moe.model.moe_layer import MoELayer

_ACTIVE_WIDTH = 4  # times D: every token passes through this hidden width, whatever K is

# Smallest distance of the K-th best logit of a token to the next, in standard deviations of the logits. A
# contender may round its logits: Mixtral's block computes them in the precision of the model.
_MARGIN = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one comparison."""

    num_experts: int
    tokens: int
    top_k: int
    d_model: int
    d_ff_expert: int

    @property
    def moe(self) -> MoEConfig:
        """The layer's settings: no token is dropped, and gate weights sum to 1 unless there is one only."""
        return MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            d_ff_expert=self.d_ff_expert,
            normalize_gate_weights=self.top_k > 1,
        )


def layer_shapes(
    experts: Sequence[int], tokens: Sequence[int], top_ks: Sequence[int], d_model: int
) -> list[LayerShape]:
    """Every combination, with experts of width `4 D / top_k`: the active FLOPs are equal.

    Raises:
        ConfigError: there are fewer experts than a token has, or the width does not divide.
    """
    active_width = _ACTIVE_WIDTH * d_model
    for top_k in top_ks:
        if active_width % (8 * top_k):
            problem = f"{active_width} / {top_k} is no multiple of 8, so experts of equal FLOPs have no width"
            raise ConfigError("--top-k", f"{problem}; use 1, 2, 4 or 8 and a --d-model such as 512")
        if top_k > min(experts) or min(experts) < 2:
            raise ConfigError("--experts", f"{min(experts)} is too few for top-{top_k}; use {max(2, top_k)}")
    return [
        LayerShape(num_experts, number, top_k, d_model, active_width // top_k)
        for number, top_k, num_experts in product(tokens, top_ks, experts)
    ]


class LayerProblem:
    """The same weights and tokens for all contenders of a shape, drawn anew from fixed seeds.

    Attributes:
        layer: our layer, which owns the weights.
        weights: its weights by name, as in a checkpoint: `router.weight`, `experts.w_gate`, ...
        hidden: (1, T, D), the layer's input. Each token's choice of experts is clear: rounding, which differs
            between contenders, does not change it.
        upstream: (1, T, D), the gradient of the output.
        tokens_per_expert: (E,) int64, as the router distributes these tokens.
    """

    def __init__(self, shape: LayerShape, device: torch.device):
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layer = MoELayer(shape.d_model, shape.moe, seed=0).to(device, self.dtype)
        self.weights = {name: weight.detach() for name, weight in self.layer.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        hidden_TD = self._clear_tokens(self.weights["router.weight"].double().cpu(), generator)
        upstream_TD = torch.randn(hidden_TD.shape, generator=generator)
        self.hidden, self.upstream = (
            tensor.to(device, self.dtype).unsqueeze(0) for tensor in (hidden_TD, upstream_TD)
        )
        with torch.no_grad():
            self.tokens_per_expert = self.layer(self.hidden)[1].tokens_per_expert

    def _clear_tokens(self, router_ED: Tensor, generator: torch.Generator) -> Tensor:
        """Random tokens, those drawn again whose K-th best expert and the next are nearly equal."""
        shape, margin = self.shape, _MARGIN[self.dtype]
        hidden_TD = torch.randn(shape.tokens, shape.d_model, generator=generator).to(self.dtype)
        unclear_T = torch.full((shape.tokens,), shape.top_k < shape.num_experts)
        while unclear_T.any():
            logits_TE = hidden_TD.double() @ router_ED.T
            best_TK = logits_TE.topk(shape.top_k + 1, dim=1).values
            unclear_T = best_TK[:, -2] - best_TK[:, -1] < margin * logits_TE.std()
            again = torch.randn(int(unclear_T.sum()), shape.d_model, generator=generator)
            hidden_TD[unclear_T] = again.to(self.dtype)
        return hidden_TD.float()
