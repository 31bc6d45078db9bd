"""The mixture-of-experts layer: route, dispatch, experts, combine.

Shape suffixes: B sequences, S positions, T = B * S tokens, K experts per token, E experts, D d_model.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.config.schema import MoEConfig
from moe.dispatch.all_to_all import Dispatcher, expert_capacity
from moe.model.experts import GroupedExperts, SwiGLU
from moe.model.grouped_mm import ExpertPath
from moe.model.losses import count_assignments, load_balancing_loss, router_entropy, router_z_loss
from moe.model.router import Router


class MoEAux(NamedTuple):
    """What a layer reports beside its output; nothing is hidden in module state.

    From the layer each field has the shape given here; from the transformer, one more leading dimension for
    its MoE layers.

    Attributes:
        load_balancing_loss: () fp32, differentiable; 1.0 at perfect balance.
        router_z_loss: () fp32, differentiable.
        tokens_per_expert: (E,) int64, assignments before dropping.
        dropped_tokens: () int64, assignments dropped for lack of capacity.
        router_entropy: () fp32, nats, detached.
        dispatch_bytes: () int64, bytes of the token rows that this rank sent to other ranks' experts; gate
            weights, expert ids, the way back and the backward pass are not in it.
    """

    load_balancing_loss: Tensor
    router_z_loss: Tensor
    tokens_per_expert: Tensor
    dropped_tokens: Tensor
    router_entropy: Tensor
    dispatch_bytes: Tensor


class MoELayer(nn.Module):
    """A sparse feed-forward layer.

    1. The router picks K experts and gate weights for every token.
    2. The dispatcher brings the tokens to their experts, sorted by expert. In training a `capacity_factor`
       bounds each expert's share, lowest gate weights dropped first; in evaluation nothing is dropped, so
       that no token's output depends on later tokens.
    3. The experts transform their rows.
    4. The dispatcher brings the rows back and sums them by gate weight.
    5. Shared experts, if any, see every token, while the rows travel, and are added (Dai et al. 2024,
       DeepSeekMoE, eq. 9).

    Args:
        d_model: D.
        moe: the section `moe` of the configuration.
        dispatcher: how tokens reach their experts; the only place where parallelism enters.
        expert_path: how the experts multiply; see `choose_expert_path`.
    """

    def __init__(self, d_model: int, moe: MoEConfig, dispatcher: Dispatcher, expert_path: ExpertPath):
        super().__init__()
        self.num_experts = moe.num_experts
        self.capacity_factor = moe.capacity_factor
        self.dispatcher = dispatcher
        self.router = Router(d_model, moe.num_experts, moe.top_k, moe.normalize_gate_weights)
        here = dispatcher.expert_ids(moe.num_experts)
        self.experts = GroupedExperts(moe.num_experts, here, d_model, moe.d_ff_expert, expert_path)
        self.shared_experts = (
            SwiGLU(d_model, moe.num_shared_experts * moe.d_ff_expert) if moe.num_shared_experts else None
        )

    def forward(self, hidden: Tensor) -> tuple[Tensor, MoEAux]:
        """Transform every token.

        Args:
            hidden: (B, S, D), any float type.

        Returns:
            (B, S, D) of the same dtype, and the report.
        """
        tokens_TD = hidden.flatten(0, 1)
        routed = self.router(tokens_TD)
        num_tokens, top_k = routed.expert_indices.shape
        capacity = None
        if self.training and self.capacity_factor is not None:
            capacity = expert_capacity(self.capacity_factor, num_tokens, top_k, self.num_experts)

        sent = self.dispatcher.dispatch(
            tokens_TD, routed.expert_indices, routed.gate_weights, self.num_experts, capacity
        )
        shared_TD = None if self.shared_experts is None else self.shared_experts(tokens_TD)
        rows_ND, rows_per_expert_E, metadata = self.dispatcher.receive(sent)
        output_TD = self.dispatcher.combine(self.experts(rows_ND, rows_per_expert_E), metadata)
        if shared_TD is not None:
            output_TD = output_TD + shared_TD

        counts_E = count_assignments(routed.expert_indices, self.num_experts)
        over_E = torch.zeros_like(counts_E) if capacity is None else (counts_E - capacity).clamp(min=0)
        aux = MoEAux(
            load_balancing_loss(
                routed.router_probs.unflatten(0, hidden.shape[:2]),
                routed.expert_indices.unflatten(0, hidden.shape[:2]),
            ),
            router_z_loss(routed.router_logits),
            counts_E,
            over_E.sum(),
            router_entropy(routed.router_probs.detach()),
            metadata.sent_bytes,
        )
        return output_TD.view_as(hidden), aux
