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
import torch.nn.functional as F
from torch import Tensor

from moe.kernels.availability import has_kernels


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


def unpermute(rows: Tensor, permutation: Permutation) -> Tensor:
    """Bring rows back to their tokens and sum them; a dropped assignment adds nothing.

    Args:
        rows: (N, D) in expert order. Rows past the last expert's are never read.
        permutation: the plan that `permute` used.

    Returns:
        (T, D), same dtype.
    """
    return _Unpermute.apply(rows, permutation)


def permute_reference(hidden: Tensor, permutation: Permutation) -> Tensor:
    """`permute` in plain indexing, differentiated by autograd."""
    K = permutation.row_of_assignment.shape[1]
    return hidden[permutation.assignment_of_row // K]


def unpermute_reference(rows: Tensor, permutation: Permutation, weights: Tensor | None = None) -> Tensor:
    """`unpermute` in plain indexing, differentiated by autograd."""
    outputs_TKD = _gather_choices(rows, permutation.row_of_assignment, permutation.kept)
    return outputs_TKD.sum(1) if weights is None else (outputs_TKD * weights.unsqueeze(2)).sum(1)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return _gather_rows(hidden_TD, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_by_token(grads[0], ctx.permutation), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return sum_by_token(rows_ND, permutation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        permutation: Permutation = ctx.permutation
        rows_ND = _gather_rows(grads[0], permutation)
        if permutation.kept is not None:
            rows_ND = torch.where(used_rows(permutation).unsqueeze(1), rows_ND, 0)
        return rows_ND, None


def _gather_rows(hidden: Tensor, permutation: Permutation) -> Tensor:
    """`permute` without gradients: each row (N, D) is its token's, of (T, D)."""
    return hidden.index_select(0, permutation.assignment_of_row // permutation.row_of_assignment.shape[1])


def sum_by_token(rows: Tensor, permutation: Permutation) -> Tensor:
    """`unpermute` without gradients: the sum (T, D) of each token's rows, of (N, D)."""
    places_TK, kept_TK = permutation.row_of_assignment, permutation.kept
    if has_kernels(rows):
        from moe.kernels.row_sum_kernel import sum_rows

        return sum_rows(rows, places_TK, kept_TK)
    if kept_TK is None:
        return F.embedding_bag(places_TK, rows, mode="sum")
    if rows.device.type != "cpu":
        return sum_without_waiting(rows, places_TK, kept_TK)
    counts_T = kept_TK.sum(1)
    return F.embedding_bag(places_TK[kept_TK], rows, counts_T.cumsum(0) - counts_T, mode="sum")


def sum_without_waiting(rows: Tensor, places_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """`sum_by_token` where the host would have to wait for the number of kept choices.

    It reads all T * K choices, some tokens at a time, so that no more than about N rows are copied.
    """
    step = max(1, -(-rows.shape[0] // places_TK.shape[1]))
    parts = zip(places_TK.split(step), kept_TK.split(step), strict=True)
    return torch.cat([_gather_choices(rows, *part).sum(1) for part in parts])


def used_rows(permutation: Permutation) -> Tensor:
    """(N,) bool: the rows that hold a kept assignment."""
    rows_N = torch.arange(len(permutation.assignment_of_row), device=permutation.assignment_of_row.device)
    return rows_N < permutation.rows_per_expert.sum()


def _gather_choices(rows_ND: Tensor, places_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
    outputs_TKD = rows_ND.index_select(0, places_TK.flatten()).unflatten(0, places_TK.shape)
    return outputs_TKD if kept_TK is None else torch.where(kept_TK.unsqueeze(2), outputs_TKD, 0)


def inverse(order_A: Tensor) -> Tensor:
    """The permutation (A,) int64 that undoes `order_A`."""
    places_A = torch.arange(order_A.numel(), device=order_A.device)
    return torch.empty_like(order_A).scatter_(0, order_A, places_A)
