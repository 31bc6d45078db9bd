"""What the router, a dispatcher and the experts hand to each other.

Shapes: T tokens of this rank, K experts per token, E experts of the layer, L experts of this rank, D d_model,
M tokens that came to this rank's experts (T where nothing travels), N rows, one for each of their choices
among these experts.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe.config import check_type
from moe.dispatch.permutation import Permutation
from moe.distributed.collectives import RowExchange


class TokenContext(NamedTuple):
    """What a router may ask of the T tokens of B sequences, in addition to their hidden states.

    Attributes:
        sequence_length: S; T is B * S.
        token_ids: (T,) int64, their numbers in the vocabulary; None if the layer was not told.
        noise_keys: (B,) int32, of which the noise of a router is a function, as the masks of a dropout are.
            None: new noise in each call, from PyTorch's random numbers.
    """

    sequence_length: int
    token_ids: Tensor | None = None
    noise_keys: Tensor | None = None


class RouterOutput(NamedTuple):
    """Where each token goes.

    Attributes:
        expert_indices: (T, K) int64, best first, distinct within a row.
        gate_weights: (T, K) fp32.
        router_logits: (T, E) fp32.
        router_probs: (T, E) fp32, rows sum to 1.
        num_assignments: None: each token goes to K experts. Else how many of the T * K choices name an
            expert; all others are E, and go nowhere.
    """

    expert_indices: Tensor
    gate_weights: Tensor
    router_logits: Tensor
    router_probs: Tensor
    num_assignments: int | None = None


def check_routing(routing: RouterOutput, num_tokens: int, num_experts: int) -> None:
    """Check what a router returned for T tokens and E experts, without waiting for a GPU.

    Raises:
        ValueError: it is no `RouterOutput`, or a tensor has another shape or dtype than that asks for; on a
            CPU, also an expert that does not exist.
    """
    check_type("what the router returns", routing, RouterOutput)
    indices = routing.expert_indices
    top_k = indices.shape[-1] if indices.dim() else 0
    for name, tensor in zip(RouterOutput._fields, routing[:4], strict=False):
        width, dtypes = num_experts, (torch.float32, torch.float64)
        if name in ("expert_indices", "gate_weights"):
            width = top_k
        if name == "expert_indices":
            dtypes = (torch.int64,)
        if tensor.shape != (num_tokens, width) or tensor.dtype not in dtypes:
            got = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{name} should be {(num_tokens, width)} of {dtypes[0]}, got {got}")
    if indices.device.type == "cpu" and indices.numel() and not torch.compiler.is_compiling():
        lowest, highest = (int(index) for index in indices.aminmax())
        most = num_experts - (routing.num_assignments is None)
        if lowest < 0 or highest > most:
            expected = f"from 0 to {most}"
            raise ValueError(f"expert_indices should be {expected}, got {lowest} to {highest}")


@dataclass(frozen=True)
class Route:
    """How rows travelled between the R ranks of an `ep_group`.

    Attributes:
        permutation: which row went to which rank.
        send: rows for each rank, R numbers.
        receive: rows from each rank, R numbers.
    """

    permutation: Permutation
    send: list[int]
    receive: list[int]


@dataclass(frozen=True)
class DispatchMetadata:
    """What `combine` needs to undo a `dispatch`, and what there is to report of it.

    Attributes:
        tokens_per_expert: (E,) int64, assignments of this rank's T tokens before dropping.
        dropped_tokens: () int64, how many of them were dropped for lack of capacity.
        sent_bytes: () int64, bytes of the rows that went to other ranks.
        permutation: which of the N rows, sorted by expert, holds which assignment of the M tokens.
        gate_weights: (M, K) fp32, of these tokens.
        route: how the rows came here; None if nothing travels.
    """

    tokens_per_expert: Tensor
    dropped_tokens: Tensor
    sent_bytes: Tensor
    permutation: Permutation
    gate_weights: Tensor
    route: Route | None = None


@dataclass(frozen=True)
class InFlight:
    """Rows on their way from `dispatch` to `receive`.

    Attributes:
        rows: (M, D) of the tokens that come here; not to be read while there is an exchange.
        metadata: for `combine`.
        exchange: the transfer to wait for; None if there is none.
    """

    rows: Tensor
    metadata: DispatchMetadata
    exchange: RowExchange | None = None


class Dispatcher(Protocol):
    """How tokens reach their experts: the one object through which parallelism enters the model."""

    def expert_ids(self, num_experts: int) -> range:
        """The L experts that live in this process, out of `num_experts` in the layer."""
        ...

    def dispatch(self, hidden: Tensor, routing: RouterOutput, capacity: int | None = None) -> InFlight:
        """Send the tokens off. Work that needs no expert may run between this and `receive`.

        Args:
            hidden: (T, D).
            routing: of these T tokens.
            capacity: most assignments an expert takes from these T tokens; the lowest gate weights beyond it
                are dropped. None: dropless.
        """
        ...

    def receive(self, in_flight: InFlight) -> Tensor:
        """The tokens (M, D) that came here; `in_flight.metadata` says which of the L experts they are for."""
        ...

    def combine(self, sums: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Bring the sums back to where the tokens came from, and add up those of a token.

        Args:
            sums: (M, D), for each token that came here the weighted sum of what its experts here made of it.
            metadata: of the same `dispatch`.

        Returns:
            (T, D), same dtype.
        """
        ...

    def recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For the `context_fn` of `torch.utils.checkpoint.checkpoint` around one layer.

        Returns:
            Contexts for the forward pass and for running it again, where nothing has to be asked anew.
        """
        ...
