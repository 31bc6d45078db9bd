"""Bring tokens to their experts and the results back: `dispatch`, `receive`, then `combine`.

Shape suffixes: T tokens, K experts per token, E experts, N rows, D d_model, R ranks that split the experts,
C copies of a token that may travel, k choices of a copy, S rows sent.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from moe.config.schema import ParallelConfig
from moe.dispatch.permutation import Permutation, permute, plan_permutation, plan_routed, unpermute
from moe.distributed.collectives import RowExchange, exchange_counts
from moe.distributed.groups import ParallelGroups
from moe.model.losses import count_assignments


@dataclass(frozen=True)
class Route:
    """How rows travelled between ranks.

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
    """What `combine` needs to undo a `dispatch`.

    Attributes:
        permutation: which row of this process's experts holds which assignment of the tokens that came here.
        gate_weights: (T, K) fp32, of the tokens that came here.
        sent_bytes: () int64, bytes of the rows that went to other ranks.
        route: how the rows came here; None where nothing travels.
    """

    permutation: Permutation
    gate_weights: Tensor
    sent_bytes: Tensor
    route: Route | None = None


@dataclass(frozen=True)
class InFlight:
    """Rows on their way from `dispatch` to `receive`.

    Attributes:
        rows: (T, D) of the tokens that come here; not to be read while there is an exchange.
        metadata: for `combine`.
        exchange: the transfer to wait for; None where there is none.
    """

    rows: Tensor
    metadata: DispatchMetadata
    exchange: RowExchange | None = None


class Dispatcher(Protocol):
    """How tokens reach their experts: the one object through which parallelism enters the model."""

    def expert_ids(self, num_experts: int) -> range:
        """The experts that live in this process, out of `num_experts` in the layer."""
        ...

    def dispatch(
        self,
        hidden: Tensor,
        expert_indices: Tensor,
        gate_weights: Tensor,
        num_experts: int,
        expert_capacity: int | None,
    ) -> InFlight:
        """Send the tokens off. Compute that needs no expert may run between this and `receive`.

        Args:
            hidden: (T, D).
            expert_indices: (T, K) int64.
            gate_weights: (T, K) fp32.
            num_experts: E.
            expert_capacity: most assignments an expert takes from these T tokens; the lowest gate weights
                beyond it are dropped. None: dropless.
        """
        ...

    def receive(self, in_flight: InFlight) -> tuple[Tensor, Tensor, DispatchMetadata]:
        """Rows (N, D) sorted by expert, the rows of each expert here (E,) int64, and the metadata."""
        ...

    def combine(self, expert_rows: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Sum each token's expert outputs, weighted by its gate weights. A dropped assignment adds nothing.

        Args:
            expert_rows: (N, D) in the order of `receive`.
            metadata: of the same `dispatch`.

        Returns:
            (T, D), the dtype of `expert_rows`.
        """
        ...


class LocalDispatcher:
    """All experts live in this process: dispatching is a permutation."""

    def expert_ids(self, num_experts: int) -> range:
        """All of them."""
        return range(num_experts)

    def dispatch(
        self,
        hidden: Tensor,
        expert_indices: Tensor,
        gate_weights: Tensor,
        num_experts: int,
        expert_capacity: int | None,
    ) -> InFlight:
        """Plan the permutation; see `Dispatcher.dispatch`."""
        permutation = plan_permutation(expert_indices, num_experts, gate_weights, expert_capacity)
        return InFlight(hidden, DispatchMetadata(permutation, gate_weights, expert_indices.new_zeros(())))

    def receive(self, in_flight: InFlight) -> tuple[Tensor, Tensor, DispatchMetadata]:
        """Sort copies of the tokens by expert; see `Dispatcher.receive`."""
        permutation = in_flight.metadata.permutation
        return permute(in_flight.rows, permutation), permutation.tokens_per_expert, in_flight.metadata

    def combine(self, expert_rows: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Bring the rows back and sum them by gate weight; see `Dispatcher.combine`."""
        return unpermute(expert_rows, metadata.permutation, metadata.gate_weights)


class AllToAllDispatcher:
    """The experts of a layer are split over the ranks of `ep_group`, consecutive ids to consecutive ranks.

    1. Each rank decides which copies of its tokens go to which rank: with `once_per_rank` one copy per rank
       that holds any of the token's experts, else one per assignment.
    2. The counts are exchanged. The host reads them: the one wait for the device.
    3. The choices of each copy (gate weights and expert ids) travel, then the rows.
    4. On arrival the copies are tokens like any other, and a `LocalDispatcher` brings them to the experts
       and sums the outputs that they get here.
    5. The sums travel back, and each token adds those of its copies.

    So a token whose experts share a rank crosses the network once, each way, as in DeepEP (DeepSeek-AI 2025)
    and Megatron-Core's flexible dispatcher.

    Args:
        groups: the ranks.
        once_per_rank: step 1.
        overlap: let the rows travel while the caller computes between `dispatch` and `receive`.
    """

    def __init__(self, groups: ParallelGroups, once_per_rank: bool = True, overlap: bool = True):
        self.group, self.num_ranks, self.rank = groups.ep_group, groups.ep_size, groups.ep_rank
        self.once_per_rank, self.overlap = once_per_rank, overlap
        self._local = LocalDispatcher()

    def expert_ids(self, num_experts: int) -> range:
        """This rank's share."""
        share = num_experts // self.num_ranks
        return range(self.rank * share, (self.rank + 1) * share)

    def dispatch(
        self,
        hidden: Tensor,
        expert_indices: Tensor,
        gate_weights: Tensor,
        num_experts: int,
        expert_capacity: int | None,
    ) -> InFlight:
        """Send the tokens to the ranks of their experts; see `Dispatcher.dispatch`."""
        share = num_experts // self.num_ranks
        if expert_capacity is not None:
            kept_TK = plan_permutation(expert_indices, num_experts, gate_weights, expert_capacity).kept
            assert kept_TK is not None
            expert_indices = expert_indices.where(kept_TK, num_experts)  # a dropped one goes nowhere
        ranks_TK = expert_indices // share
        ranks_TC = self._distinct(ranks_TK) if self.once_per_rank else ranks_TK

        rows_R = count_assignments(ranks_TC, self.num_ranks + 1).narrow(0, 0, self.num_ranks)
        assignments_R = count_assignments(ranks_TK, self.num_ranks + 1).narrow(0, 0, self.num_ranks)
        sent, received = exchange_counts(torch.stack([rows_R, assignments_R], 1), self.group)
        send, receive = [rows for rows, _ in sent], [rows for rows, _ in received]
        num_assignments = sum(assignments for _, assignments in received)

        to_ranks = plan_routed(ranks_TC, self.num_ranks, sum(send))
        choices_Sk2 = self._choices(expert_indices, gate_weights, ranks_TK, ranks_TC, share, to_ranks)
        exchange = RowExchange(send, receive, self.group)
        # Two exchanges, as in the backward pass both are under way at once. This one first: on a GPU, waiting
        # for it after the rows had started would be waiting for the rows.
        gates_Tk, ids_Tk = RowExchange(send, receive, self.group).run(choices_Sk2).unbind(2)
        rows_SD = permute(hidden, to_ranks)
        rows_TD = exchange.start(rows_SD) if self.overlap else exchange.run(rows_SD)

        here = plan_routed(ids_Tk.detach().to(torch.int64), share, num_assignments)
        off_rank = rows_R.sum() - rows_R.narrow(0, self.rank, 1).sum()
        sent_bytes = off_rank * (hidden.shape[1] * hidden.element_size())
        metadata = DispatchMetadata(here, gates_Tk, sent_bytes, Route(to_ranks, send, receive))
        return InFlight(rows_TD, metadata, exchange if self.overlap else None)

    def receive(self, in_flight: InFlight) -> tuple[Tensor, Tensor, DispatchMetadata]:
        """Wait for the rows and sort copies of them by expert; see `Dispatcher.receive`."""
        if in_flight.exchange is not None:
            in_flight = replace(in_flight, rows=in_flight.exchange.wait(in_flight.rows))
        return self._local.receive(in_flight)

    def combine(self, expert_rows: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Sum what each copy got here, send the sums back, add them up; see `Dispatcher.combine`."""
        route = metadata.route
        assert route is not None, "metadata of another dispatcher"
        sums_TD = self._local.combine(expert_rows, metadata)
        sums_SD = RowExchange(route.receive, route.send, self.group).run(sums_TD)
        return unpermute(sums_SD, route.permutation)

    def _distinct(self, ranks_TK: Tensor) -> Tensor:
        """Each token's ranks without repetition, (T, C), filled up with R, which is no rank."""
        sorted_TK = ranks_TK.sort(1).values
        repeats = sorted_TK.narrow(1, 1, sorted_TK.shape[1] - 1) == sorted_TK.narrow(
            1, 0, sorted_TK.shape[1] - 1
        )
        first_TK = torch.nn.functional.pad(repeats, (1, 0)).logical_not()
        distinct_TK = sorted_TK.where(first_TK, self.num_ranks).sort(1).values
        return distinct_TK.narrow(1, 0, min(distinct_TK.shape[1], self.num_ranks))

    def _choices(
        self,
        expert_indices: Tensor,
        gate_weights: Tensor,
        ranks_TK: Tensor,
        ranks_TC: Tensor,
        share: int,
        to_ranks: Permutation,
    ) -> Tensor:
        """What each row sent wants there, (S, k, 2): gate weight, and place among the rank's experts.

        A place of `share` marks a choice whose expert is elsewhere. Places are small integers, exact in fp32.
        """
        places_TK = expert_indices % share
        if self.once_per_rank:
            is_there_TCK = ranks_TC.unsqueeze(2) == ranks_TK.unsqueeze(1)
            places_TCk = places_TK.unsqueeze(1).where(is_there_TCK, share)
            gates_TCk = gate_weights.unsqueeze(1).expand(is_there_TCK.shape)
        else:
            places_TCk, gates_TCk = places_TK.unsqueeze(2), gate_weights.unsqueeze(2)
        choices_TCk2 = torch.stack([gates_TCk, places_TCk.to(gates_TCk.dtype)], 3)
        return choices_TCk2.flatten(0, 1).index_select(0, to_ranks.assignment_of_row)


def choose_dispatcher(groups: ParallelGroups, parallel: ParallelConfig) -> Dispatcher:
    """The dispatcher of a run: a local one where each rank holds all experts."""
    if parallel.ep_size == 1:
        return LocalDispatcher()
    return AllToAllDispatcher(groups, parallel.dispatch == "once_per_rank", parallel.overlap)


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """`ceil(capacity_factor * T * K / E)` assignments, with no hidden minimum (Fedus et al. 2021, eq. 3).

    The factor is taken as the decimal number it was written as: 1.1 * 10 tokens are 11 slots, not the 12
    that binary rounding would give.
    """
    return math.ceil(Fraction(str(capacity_factor)) * num_tokens * top_k / num_experts)
