"""Bring the rows of a batch into expert order and back, deterministically and without waiting for the device.

An *assignment* is one (token, choice) pair; its flat index is `t * K + k`. `plan_permutation` decides which
row of the expert-sorted batch holds which assignment; `permute` copies tokens to their rows and `unpermute`
sums rows by token, and each is the other's backward pass: gathers, never atomic additions, so that two runs
on a GPU agree bit for bit.

Shape suffixes: T tokens, K experts per token, E experts, A = T * K assignments, N rows, D d_model.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.model.losses import count_assignments


@dataclass(frozen=True)
class Permutation:
    """Which row holds which assignment.

    Attributes:
        assignment_of_row: (N,) int64. Rows past `tokens_per_expert.sum()` hold no kept assignment.
        row_of_assignment: (T, K) int64. Undefined, but a valid index, for a dropped assignment.
        tokens_per_expert: (E,) int64, rows of each expert after dropping, in the order of the rows.
        kept: (T, K) bool, or None when nothing can be dropped.
    """

    assignment_of_row: Tensor
    row_of_assignment: Tensor
    tokens_per_expert: Tensor
    kept: Tensor | None


def plan_permutation(
    expert_indices: Tensor, num_experts: int, gate_weights: Tensor, expert_capacity: int | None = None
) -> Permutation:
    """Sort the assignments by expert; with a capacity, drop each expert's lowest gate weights.

    Equal gate weights are kept in the order of choices, first choices before second ones, then of tokens.
    The number of rows is `T * K` when dropless, else `min(T * K, E * expert_capacity)`: a bound that needs no
    look at the data, so that the device is never waited for.

    Args:
        expert_indices: (T, K) int64, the experts of each token, best first.
        num_experts: E.
        gate_weights: (T, K), any float type; read only when there is a capacity.
        expert_capacity: most assignments an expert may take. None: dropless.

    Returns:
        The plan, on the device of `expert_indices`.
    """
    T, K = expert_indices.shape
    counts_E = count_assignments(expert_indices, num_experts)
    if expert_capacity is None:
        order_A = expert_indices.flatten().argsort(stable=True)
        return Permutation(order_A, _inverse(order_A).view(T, K), counts_E, None)

    # Two stable sorts make one ordering by (expert, gate weight descending, choice, token).
    by_choice_A = torch.arange(T * K, device=expert_indices.device).view(T, K).t().flatten()
    gates_A = gate_weights.detach().flatten().gather(0, by_choice_A)
    by_gate_A = by_choice_A.gather(0, gates_A.argsort(descending=True, stable=True))
    experts_A, by_expert = expert_indices.flatten().gather(0, by_gate_A).sort(stable=True)
    order_A = by_gate_A.gather(0, by_expert)
    first_row_E = counts_E.cumsum(0) - counts_E
    place_A = torch.arange(T * K, device=order_A.device) - first_row_E.gather(0, experts_A)

    # Dropped assignments go behind all kept ones; what fits into the bound is cut off there.
    dropped_A, kept_first = (place_A >= expert_capacity).to(torch.uint8).sort(stable=True)
    order_A = order_A.gather(0, kept_first)
    num_rows = min(T * K, num_experts * expert_capacity)
    row_A = _inverse(order_A)
    return Permutation(
        assignment_of_row=order_A.narrow(0, 0, num_rows),
        row_of_assignment=row_A.clamp(max=num_rows - 1).view(T, K),
        tokens_per_expert=counts_E.clamp(max=expert_capacity),
        kept=(dropped_A.gather(0, row_A) == 0).view(T, K),
    )


def plan_routed(places: Tensor, num_places: int, num_rows: int) -> Permutation:
    """Sort the assignments that have a place, leaving out those marked with `num_places`.

    Args:
        places: (T, K) int64 from 0 to `num_places`, which marks an assignment that goes nowhere.
        num_places: E experts, or ranks.
        num_rows: N, how many assignments have a place.

    Returns:
        The plan, with E = `num_places`.
    """
    order_A = places.flatten().argsort(stable=True)
    row_A = _inverse(order_A).clamp(max=max(num_rows - 1, 0))
    return Permutation(
        assignment_of_row=order_A.narrow(0, 0, num_rows),
        row_of_assignment=row_A.view(places.shape),
        tokens_per_expert=count_assignments(places, num_places + 1).narrow(0, 0, num_places),
        kept=places < num_places,
    )


def permute(hidden: Tensor, permutation: Permutation) -> Tensor:
    """Copy each token's row once per kept assignment, in expert order.

    Args:
        hidden: (T, D).
        permutation: the plan for these T tokens.

    Returns:
        (N, D), same dtype, contiguous.
    """
    return _Permute.apply(hidden, permutation)


def unpermute(rows: Tensor, permutation: Permutation, weights: Tensor | None = None) -> Tensor:
    """Bring rows back to their tokens and sum them by weight; a dropped assignment adds nothing.

    What it keeps for the backward pass are the N rows, not (T, K, D), most of which may be empty: where a
    token came for one expert of this rank, K - 1 of its K places are.

    Args:
        rows: (N, D) in expert order. Rows past the last expert's are never read.
        permutation: the plan that `permute` used.
        weights: (T, K), any float type; None: all 1.

    Returns:
        (T, D), the dtype of `rows`; row t is the sum over kept k of `weights[t, k]` times the row of (t, k).
    """
    if weights is None:
        return _Sum.apply(rows, permutation)
    return _WeightedSum.apply(rows, weights, permutation)


def permute_reference(hidden: Tensor, permutation: Permutation) -> Tensor:
    """`permute` in plain indexing, differentiated by autograd."""
    K = permutation.row_of_assignment.shape[1]
    return hidden[permutation.assignment_of_row // K]


def unpermute_reference(rows: Tensor, permutation: Permutation, weights: Tensor | None = None) -> Tensor:
    """`unpermute` in plain indexing, differentiated by autograd."""
    outputs_TKD = _gather(rows, permutation.row_of_assignment, permutation.kept)
    return outputs_TKD.sum(1) if weights is None else (outputs_TKD * weights.unsqueeze(2)).sum(1)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _spread(hidden_TD, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.permutation, None), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _sum(rows_ND, permutation, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _spread(grads[0], ctx.permutation, masked=True), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        ctx.save_for_backward(rows_ND, weights_TK)
        return _sum(rows_ND, permutation, weights_TK.to(rows_ND.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        permutation: Permutation = ctx.permutation
        rows_ND, weights_TK = ctx.saved_tensors
        order_N = permutation.assignment_of_row
        grad_ND = _spread(grads[0], permutation, masked=True)
        dots_N = torch.linalg.vecdot(rows_ND, grad_ND).to(weights_TK.dtype)
        if permutation.kept is not None:  # undefined rows times zero may be NaN
            dots_N = torch.where(_used(permutation), dots_N, 0)
        grad_TK = torch.zeros_like(weights_TK).flatten().scatter(0, order_N, dots_N).view_as(weights_TK)
        weights_N = weights_TK.flatten().index_select(0, order_N).to(rows_ND.dtype)
        return grad_ND * weights_N.unsqueeze(1), grad_TK, None


def _spread(hidden_TD: Tensor, permutation: Permutation, masked: bool = False) -> Tensor:
    """Each assignment's row is its token's; masked: zeros in the rows of no kept assignment."""
    K = permutation.row_of_assignment.shape[1]
    rows_ND = hidden_TD.index_select(0, permutation.assignment_of_row // K)
    if masked and permutation.kept is not None:
        rows_ND = torch.where(_used(permutation).unsqueeze(1), rows_ND, 0)
    return rows_ND


def _sum(rows_ND: Tensor, permutation: Permutation, weights_TK: Tensor | None) -> Tensor:
    """Each token's rows, summed up; some tokens at a time, so that no more than about N rows are copied."""
    places_TK, kept_TK = permutation.row_of_assignment, permutation.kept
    step = max(1, -(-rows_ND.shape[0] // places_TK.shape[1]))
    places = places_TK.split(step)
    kept = [None] * len(places) if kept_TK is None else kept_TK.split(step)
    gathered = (_gather(rows_ND, *some) for some in zip(places, kept, strict=True))
    if weights_TK is None:
        sums = [outputs_tKD.sum(1) for outputs_tKD in gathered]
    else:
        weights = weights_TK.unsqueeze(1).split(step)
        sums = [torch.bmm(*pair).squeeze(1) for pair in zip(weights, gathered, strict=True)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def _gather(rows_ND: Tensor, places_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    outputs_TKD = rows_ND.index_select(0, places_TK.flatten()).unflatten(0, places_TK.shape)
    return outputs_TKD if kept_TK is None else torch.where(kept_TK.unsqueeze(2), outputs_TKD, 0)


def _used(permutation: Permutation) -> Tensor:
    """(N,) bool: the rows that hold a kept assignment."""
    rows_N = torch.arange(len(permutation.assignment_of_row), device=permutation.assignment_of_row.device)
    return rows_N < permutation.tokens_per_expert.sum()


def _inverse(order_A: Tensor) -> Tensor:
    places_A = torch.arange(order_A.numel(), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, places_A)
