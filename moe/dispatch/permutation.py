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


@dataclass(frozen=True)
class Permutation:
    """Which row holds which assignment.

    Attributes:
        assignment_of_row: (N,) int64. Rows past `rows_per_expert.sum()` hold no kept assignment.
        row_of_assignment: (T, K) int64. Undefined, but a valid index, for a dropped assignment.
        rows_per_expert: (E,) int64, after dropping, in the order of the rows.
        kept: (T, K) bool, or None when nothing can be dropped.
    """

    assignment_of_row: Tensor
    row_of_assignment: Tensor
    rows_per_expert: Tensor
    kept: Tensor | None


def count_assignments(expert_indices: Tensor, num_experts: int) -> Tensor:
    """How many assignments each expert got, without waiting for the device.

    Args:
        expert_indices: (T, K) int64.
        num_experts: E.

    Returns:
        (E,) int64, summing to T * K.
    """
    flat = expert_indices.flatten()
    return flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))


def plan_permutation(expert_indices: Tensor, tokens_per_expert: Tensor) -> Permutation:
    """Sort all assignments by expert; nothing is dropped.

    Args:
        expert_indices: (T, K) int64.
        tokens_per_expert: (E,) int64, from `count_assignments`.

    Returns:
        The plan, with T * K rows, on the device of `expert_indices`.
    """
    order_A = expert_indices.flatten().argsort(stable=True)
    return Permutation(order_A, inverse(order_A).view(expert_indices.shape), tokens_per_expert, None)


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
    row_A = inverse(order_A).clamp(max=max(num_rows - 1, 0))
    return Permutation(
        assignment_of_row=order_A.narrow(0, 0, num_rows),
        row_of_assignment=row_A.view(places.shape),
        rows_per_expert=count_assignments(places, num_places + 1).narrow(0, 0, num_places),
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
    return rows_N < permutation.rows_per_expert.sum()


def inverse(order_A: Tensor) -> Tensor:
    """The permutation (A,) int64 that undoes `order_A`."""
    places_A = torch.arange(order_A.numel(), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, places_A)
