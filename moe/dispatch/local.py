"""Dispatch within one process: nothing travels."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from moe.dispatch.capacity import plan_with_capacity
from moe.dispatch.interface import DispatchMetadata, InFlight, RouterOutput
from moe.dispatch.permutation import count_assignments, plan_permutation, plan_routed


class LocalDispatcher:
    """All experts live in this process. Also the reference that `AllToAllDispatcher` is tested against."""

    def expert_ids(self, num_experts: int) -> range:
        """All of them."""
        return range(num_experts)

    def dispatch(self, hidden: Tensor, routing: RouterOutput, capacity: int | None = None) -> InFlight:
        """Plan the permutation; see `Dispatcher.dispatch`."""
        indices, gates = routing.expert_indices, routing.gate_weights
        num_experts = routing.router_probs.shape[1]
        counts_E = count_assignments(indices, num_experts + 1).narrow(0, 0, num_experts)
        if routing.num_assignments is not None:
            permutation = plan_routed(indices, num_experts, routing.num_assignments)
        elif capacity is None:
            permutation = plan_permutation(indices, counts_E)
        else:
            permutation = plan_with_capacity(indices, counts_E, gates, capacity)
        dropped, sent_bytes = (counts_E - permutation.rows_per_expert).sum(), counts_E.new_zeros(())
        return InFlight(hidden, DispatchMetadata(counts_E, dropped, sent_bytes, permutation, gates))

    def receive(self, in_flight: InFlight) -> Tensor:
        """The tokens, which have not moved; see `Dispatcher.receive`."""
        return in_flight.rows

    def combine(self, sums: Tensor, metadata: DispatchMetadata) -> Tensor:
        """Each token's sum is complete; see `Dispatcher.combine`."""
        return sums

    def recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Nothing is asked of others; see `Dispatcher.recomputation`."""
        return nullcontext(), nullcontext()
