"""Dispatch between ranks: an uneven all-to-all to the ranks of the experts, and another one back.

Shape suffixes: T tokens of this rank, K experts per token, E experts of the layer, L of them on each rank,
R ranks that split the experts, C destinations of a token (at most R once per rank, K once per expert),
k choices sent with a row, S rows sent, M rows that arrive, D d_model.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from moe.config import ParallelConfig
from moe.dispatch.capacity import plan_with_capacity
from moe.dispatch.interface import Dispatcher, DispatchMetadata, InFlight, Route, RouterOutput
from moe.dispatch.local import LocalDispatcher
from moe.dispatch.permutation import count_assignments, permute, plan_routed, unpermute
from moe.distributed.collectives import RowExchange, exchange_counts
from moe.distributed.groups import ParallelGroups

_Numbers = tuple[list[list[int]], list[list[int]]]  # as `exchange_counts` returns them


class AllToAllDispatcher:
    """The experts of a layer are split over the ranks of `ep_group`, consecutive ids to consecutive ranks.

    A token whose experts share a rank crosses the network once each way, as in DeepEP (DeepSeek-AI 2025) and
    Megatron-Core's flexible dispatcher: on arrival it is a token like any other. The experts there sum their
    outputs, and one row travels back.

    Args:
        groups: the ranks.
        once_per_rank: send a token once to a rank that holds several of its experts, else once per expert.
        overlap: let the rows travel while the caller works between `dispatch` and `receive`.
        compiled: whether torch.compile compiles the layer. The exchanges then stay out of its graphs, since
            only the host knows their sizes.
    """

    def __init__(
        self, groups: ParallelGroups, once_per_rank: bool = True, overlap: bool = True, compiled: bool = False
    ):
        self.group, self.num_ranks, self.rank = groups.ep_group, groups.ep_size, groups.ep_rank
        self.once_per_rank, self.overlap = once_per_rank, overlap
        self.counts_of_forward: _Counts | None = None  # while a forward pass that is run again is under way
        for name in ("dispatch", "receive", "combine") if compiled else ():
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def expert_ids(self, num_experts: int) -> range:
        """This rank's share."""
        share = num_experts // self.num_ranks
        return range(self.rank * share, (self.rank + 1) * share)

    def dispatch(self, hidden: Tensor, routing: RouterOutput, capacity: int | None = None) -> InFlight:
        """Send the tokens to the ranks of their experts; see `Dispatcher.dispatch`."""
        num_experts = routing.router_probs.shape[1]
        share = num_experts // self.num_ranks  # L

        # 1. Drop what is over capacity: such an assignment gets expert E, whose rank R does not exist.
        counts_E = count_assignments(routing.expert_indices, num_experts + 1).narrow(0, 0, num_experts)
        kept_E = counts_E
        if capacity is not None:
            plan = plan_with_capacity(routing.expert_indices, counts_E, routing.gate_weights, capacity)
            assert plan.kept is not None
            kept_E = plan.rows_per_expert
            routing = routing._replace(expert_indices=routing.expert_indices.where(plan.kept, num_experts))

        # 2. Decide which rows go to which rank: each token's ranks, without repetition or one per expert.
        ranks_TK = routing.expert_indices // share
        ranks_TC = self._distinct(ranks_TK) if self.once_per_rank else ranks_TK

        # 3. Exchange how many rows and assignments come. The host reads them: its one wait for the device.
        rows_R = count_assignments(ranks_TC, self.num_ranks + 1).narrow(0, 0, self.num_ranks)
        assignments_R = kept_E.view(self.num_ranks, share).sum(1)
        sent, received = self._exchange(torch.stack([rows_R, assignments_R], 1))
        send, receive = [rows for rows, _ in sent], [rows for rows, _ in received]
        num_assignments = sum(assignments for _, assignments in received)

        # 4. Send the choices of each row, then the rows. Two exchanges, since in the backward pass both are
        # under way at once. The choices first: transfers on a GPU finish in order, so choices that were sent
        # after the rows would arrive after them.
        to_ranks = plan_routed(ranks_TC, self.num_ranks, sum(send))
        choices_Sk2 = self._choices(routing, ranks_TC, share).index_select(0, to_ranks.assignment_of_row)
        gates_Mk, places_Mk = RowExchange(send, receive, self.group).run(choices_Sk2).unbind(2)
        exchange = RowExchange(send, receive, self.group)
        rows_SD = permute(hidden, to_ranks)
        rows_MD = exchange.start(rows_SD) if self.overlap else exchange.run(rows_SD)

        # 5. Plan the way from the rows that arrive to the experts of this rank.
        here = plan_routed(places_Mk.detach().to(torch.int64), share, num_assignments)
        off_rank = rows_R.sum() - rows_R.narrow(0, self.rank, 1).sum()
        metadata = DispatchMetadata(
            tokens_per_expert=counts_E,
            dropped_tokens=(counts_E - kept_E).sum(),
            sent_bytes=off_rank * (hidden.shape[1] * hidden.element_size()),
            permutation=here,
            gate_weights=gates_Mk,
            route=Route(to_ranks, send, receive),
        )
        return InFlight(rows_MD, metadata, exchange if self.overlap else None)

    def receive(self, in_flight: InFlight) -> Tensor:
        """Wait for the rows; see `Dispatcher.receive`."""
        if in_flight.exchange is None:
            return in_flight.rows
        return in_flight.exchange.wait(in_flight.rows)

    def combine(self, sums: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Send the sums back and add them up by token; see `Dispatcher.combine`."""
        route = metadata.route
        assert route is not None, "metadata of another dispatcher"
        sums_SD = RowExchange(route.receive, route.send, self.group).run(sums)
        return unpermute(sums_SD, route.permutation)

    def recomputation(self) -> tuple["_Counts", "_Counts"]:
        """Exchange counts in the forward pass only, and keep them; see `Dispatcher.recomputation`."""
        kept: list[_Numbers] = []
        return _Counts(self, kept, reads=False), _Counts(self, kept, reads=True)

    def _exchange(self, counts_R2: Tensor) -> _Numbers:
        counts = self.counts_of_forward
        if counts is not None and counts.reads:
            return counts.kept[0]
        numbers = exchange_counts(counts_R2, self.group)
        if counts is not None:
            counts.kept.append(numbers)
        return numbers

    def _distinct(self, ranks_TK: Tensor) -> Tensor:
        """Each token's ranks without repetition, (T, C), filled up with R, which is no rank."""
        sorted_TK = ranks_TK.sort(1).values
        others = sorted_TK.shape[1] - 1
        repeats = sorted_TK.narrow(1, 1, others) == sorted_TK.narrow(1, 0, others)
        first_TK = torch.nn.functional.pad(repeats, (1, 0)).logical_not()
        distinct_TK = sorted_TK.where(first_TK, self.num_ranks).sort(1).values
        return distinct_TK.narrow(1, 0, min(distinct_TK.shape[1], self.num_ranks))

    def _choices(self, routing: RouterOutput, ranks_TC: Tensor, share: int) -> Tensor:
        """The choices of each token and destination, (T * C, k, 2): gate weight, and place of the expert.

        A place of L (`share`) marks a choice whose expert is elsewhere. Places are small, so exact in fp32.
        """
        ranks_TK, places_TK = routing.expert_indices // share, routing.expert_indices % share
        if self.once_per_rank:
            is_there_TCK = ranks_TC.unsqueeze(2) == ranks_TK.unsqueeze(1)
            places_TCk = places_TK.unsqueeze(1).where(is_there_TCK, share)
            gates_TCk = routing.gate_weights.unsqueeze(1).expand(is_there_TCK.shape)
        else:
            places_TCk, gates_TCk = places_TK.unsqueeze(2), routing.gate_weights.unsqueeze(2)
        return torch.stack([gates_TCk, places_TCk.to(gates_TCk.dtype)], 3).flatten(0, 1)


class _Counts(AbstractContextManager[None]):
    """The counts of one layer's dispatch: kept in the forward pass, and read when that is run again."""

    def __init__(self, dispatcher: AllToAllDispatcher, kept: list[_Numbers], reads: bool):
        self.dispatcher, self.kept, self.reads = dispatcher, kept, reads

    def __enter__(self) -> None:
        self.dispatcher.counts_of_forward = self

    def __exit__(self, *_: object) -> None:
        self.dispatcher.counts_of_forward = None


def choose_dispatcher(groups: ParallelGroups, parallel: ParallelConfig, compiled: bool = False) -> Dispatcher:
    """The dispatcher of a run, compiled or not: a local one where each rank holds all experts."""
    if parallel.ep_size == 1:
        return LocalDispatcher()
    return AllToAllDispatcher(groups, parallel.dispatch == "once_per_rank", parallel.overlap, compiled)
