"""The mixture-of-experts layer: route, dispatch, experts, combine.

Shape suffixes: B sequences, S positions, T = B * S tokens, M tokens that came to the experts of this process,
K experts per token, E experts, D d_model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from moe.config import MoEConfig, check_type
from moe.dispatch.capacity import expert_capacity
from moe.dispatch.interface import Dispatcher, DispatchMetadata, RouterOutput, TokenContext, check_routing
from moe.dispatch.local import LocalDispatcher
from moe.model.experts import GroupedExperts, SwiGLU
from moe.model.grouped_swiglu import ExpertPath
from moe.model.initialization import init_weights
from moe.model.losses import load_balancing_loss, router_entropy, router_z_loss
from moe.model.products import Linear, is_autocast
from moe.model.router_health import router_health
from moe.model.router_rules import ROUTERS, make_router


class MoEAux(NamedTuple):
    """What a layer reports in addition to its output; nothing is kept in module state.

    From the layer each field has the shape given here; from the transformer, one more leading dimension for
    its MoE layers.

    Attributes:
        load_balancing_loss: () fp32, differentiable, of the sequences; 1.0 at perfect balance.
        router_z_loss: () fp32, differentiable.
        mean_probs: (E,) fp32, differentiable, the mean of the router probabilities.
        tokens_per_expert: (E,) int64, tokens that chose each expert, before dropping.
        dropped_tokens: () int64, of these tokens, how many were dropped for lack of capacity.
        router_entropy: () fp32, nats, detached.
        health: (3,) fp32, detached, see `router_health`.
        dispatch_bytes: () int64, bytes of the token rows that this rank sent to other ranks' experts; gate
            weights, expert ids, the way back and the backward pass are not in it.
    """

    load_balancing_loss: Tensor
    router_z_loss: Tensor
    mean_probs: Tensor
    tokens_per_expert: Tensor
    dropped_tokens: Tensor
    router_entropy: Tensor
    health: Tensor
    dispatch_bytes: Tensor


class MoELayer(nn.Module):
    """A sparse feed-forward layer.

    1. The router picks K experts and gate weights for every token.
    2. The dispatcher brings the tokens to the processes of their experts. In training a `capacity_factor`
       bounds each expert's share, lowest gate weights dropped first; in evaluation nothing is dropped, so
       that no token's output depends on later tokens.
    3. The experts transform the tokens; each token's outputs are summed by gate weight.
    4. The dispatcher brings the sums back and adds up those of a token that was in several processes.

    While the tokens travel, shared experts, if any, transform every token; their output is added at the end
    (Dai et al. 2024, DeepSeekMoE, eq. 9), with `moe.shared_expert_gate` times the sigmoid of a learned
    projection of the token (Qwen Team 2024, Qwen1.5-MoE).

    Args:
        d_model: D.
        moe: the section `moe` of the configuration.
        dispatcher: how tokens reach their experts, the only place where parallelism enters. None: all experts
            are in this process.
        expert_path: how the experts multiply; see `GroupedExperts`.
        seed: the weights start as in `initial_weights` of this seed, so layers of one seed start equal. None:
            as those of `nn.Linear`, from PyTorch's random numbers. Several ranks need a seed, as their
            routers have to be equal.

    Raises:
        ValueError: an argument of another type, or settings that do not go together.
    """

    def __init__(
        self,
        d_model: int,
        moe: MoEConfig,
        dispatcher: Dispatcher | None = None,
        expert_path: ExpertPath | None = None,
        seed: int | None = None,
    ):
        super().__init__()
        check_type("moe", moe, MoEConfig)
        dispatcher = dispatcher or LocalDispatcher()
        self.d_model, self.num_experts = d_model, moe.num_experts
        self.capacity_factor = moe.capacity_factor
        self.dispatcher = dispatcher
        self.router: Any = make_router(d_model, moe)
        here = dispatcher.expert_ids(moe.num_experts)
        self.experts = GroupedExperts(moe.num_experts, here, d_model, moe.d_ff_expert, expert_path)
        self.shared_experts = (
            SwiGLU(d_model, moe.num_shared_experts * moe.d_ff_expert) if moe.num_shared_experts else None
        )
        self.shared_gate = Linear(d_model, 1) if moe.shared_expert_gate else None
        if seed is not None:
            init_weights(self, seed)

    def extra_repr(self) -> str:
        """The sizes, for `print`; the parts print their own."""
        return f"d_model={self.d_model}, capacity_factor={self.capacity_factor}"

    def forward(
        self,
        hidden: Tensor,
        with_report: bool = True,
        token_ids: Tensor | None = None,
        noise_keys: Tensor | None = None,
    ) -> tuple[Tensor, MoEAux | None]:
        """Transform every token.

        Args:
            hidden: (B, S, D) in the dtype of the experts' weights, under `torch.autocast` any float type.
            with_report: generating text needs none.
            token_ids: (B, S) int64, which `moe.router=hash` needs.
            noise_keys: (B,) int32, see `TokenContext`.

        Returns:
            (B, S, D) of the same dtype, or that of `torch.autocast`, and the report if it is wanted.

        Raises:
            ValueError: the input has another shape or dtype, or a router of your own returns what
                `RouterOutput` does not allow.
        """
        if hidden.dim() != 3 or hidden.shape[2] != self.d_model or not hidden.is_floating_point():
            expected = f"(batch, sequence, {self.d_model}) of a float type"
            raise ValueError(f"hidden should be {expected}, got {tuple(hidden.shape)} of {hidden.dtype}")
        dtype = self.experts.w_gate.dtype
        if hidden.dtype != dtype and not is_autocast(hidden.device):
            fix = "convert one of them, or use torch.autocast"
            raise ValueError(f"hidden is of {hidden.dtype} and the experts are of {dtype}; {fix}")
        tokens_TD = hidden.flatten(0, 1)
        ids_T = None if token_ids is None else token_ids.flatten()
        routing = self._route(tokens_TD, TokenContext(hidden.shape[1], ids_T, noise_keys))
        num_tokens, top_k = routing.expert_indices.shape
        capacity = None
        if self.training and self.capacity_factor is not None:
            capacity = expert_capacity(self.capacity_factor, num_tokens, top_k, self.num_experts)

        in_flight = self.dispatcher.dispatch(tokens_TD, routing, capacity)
        shared_TD = None if self.shared_experts is None else self.shared_experts(tokens_TD)
        if shared_TD is not None and self.shared_gate is not None:
            shared_TD = shared_TD * self.shared_gate(tokens_TD).sigmoid()
        arrived_MD, metadata = self.dispatcher.receive(in_flight), in_flight.metadata
        sums_MD = self.experts(arrived_MD, metadata.gate_weights, metadata.permutation)
        output_TD = self.dispatcher.combine(sums_MD, metadata)
        if shared_TD is not None:
            output_TD = output_TD + shared_TD
        aux = _report(routing, metadata, hidden.shape[:2]) if with_report else None
        return output_TD.view_as(hidden), aux

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(...)` and `.bfloat16()`, the router to the device only: it stays in fp32."""

        def in_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            widen = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if widen else moved

        for child in self.children() if recurse else ():
            child._apply(in_fp32 if child is self.router else fn)
        return super()._apply(fn, recurse=False)

    def _route(self, tokens_TD: Tensor, context: TokenContext) -> RouterOutput:
        if type(self.router) in ROUTERS.values():
            return self.router(tokens_TD, context)
        with torch.autocast(tokens_TD.device.type, enabled=False):
            routing = self.router(tokens_TD, context)
        check_routing(routing, len(tokens_TD), self.num_experts)
        return routing


def _report(routing: RouterOutput, metadata: DispatchMetadata, by_sequence: Sequence[int]) -> MoEAux:
    return MoEAux(
        load_balancing_loss=load_balancing_loss(
            routing.router_probs.unflatten(0, by_sequence), routing.expert_indices.unflatten(0, by_sequence)
        ),
        router_z_loss=router_z_loss(routing.router_logits),
        mean_probs=routing.router_probs.sum(0) / max(len(routing.router_probs), 1),
        tokens_per_expert=metadata.tokens_per_expert,
        dropped_tokens=metadata.dropped_tokens,
        router_entropy=router_entropy(routing.router_probs.detach()),
        health=router_health(routing.router_logits, routing.router_probs),
        dispatch_bytes=metadata.sent_bytes,
    )
