"""Rows into expert order and back, against plain indexing. What is dropped on the way: test_capacity.py."""

import pytest
import torch
from torch import Tensor

from moe.dispatch.capacity import plan_with_capacity
from moe.dispatch.permutation import (
    Permutation,
    count_assignments,
    permute,
    permute_reference,
    plan_permutation,
    plan_routed,
    sum_by_token,
    sum_without_waiting,
    unpermute,
    unpermute_reference,
)

ROUTINGS = {
    "random": lambda: torch.rand(16, 8).topk(3, dim=1).indices,
    "all on one expert": lambda: torch.full((16, 1), 5),
    "empty experts": lambda: torch.tensor([[7, 0]] * 9),
    "one token": lambda: torch.tensor([[2, 1]]),
}


def planned(indices: Tensor, num_experts: int) -> Permutation:
    return plan_permutation(indices, count_assignments(indices, num_experts))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_unpermute_brings_back_what_permute_copied(routing):
    indices = ROUTINGS[routing]()
    hidden = torch.randn(indices.shape[0], 4, dtype=torch.float64)
    plan = planned(indices, 8)
    rows = permute(hidden, plan)
    torch.testing.assert_close(unpermute(rows, plan), indices.shape[1] * hidden)
    assert torch.equal(rows, hidden.repeat_interleave(indices.shape[1], 0)[plan.assignment_of_row])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_sorted_by_expert_and_counted(routing):
    indices = ROUTINGS[routing]()
    plan = planned(indices, 8)
    experts_of_rows = indices.flatten()[plan.assignment_of_row]
    assert experts_of_rows.tolist() == sorted(indices.flatten().tolist())
    assert plan.rows_per_expert.tolist() == [int((indices == expert).sum()) for expert in range(8)]


def test_counts_include_experts_without_tokens():
    assert count_assignments(torch.tensor([[0, 3], [3, 5]]), 6).tolist() == [1, 0, 0, 2, 0, 1]


@pytest.mark.parametrize("capacity", [None, 1, 3, 100])
def test_both_directions_equal_their_references_with_gradients(capacity):
    torch.manual_seed(1)
    indices, gates = torch.rand(12, 5).topk(2, dim=1).indices, torch.rand(12, 2)
    plan = planned(indices, 5)
    if capacity is not None:
        plan = plan_with_capacity(indices, count_assignments(indices, 5), gates, capacity)
    hidden = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(plan.assignment_of_row), 3, dtype=torch.float64, requires_grad=True)
    used = int(plan.rows_per_expert.sum())

    forward, reference = permute(hidden, plan), permute_reference(hidden, plan)
    torch.testing.assert_close(forward, reference, rtol=0, atol=0)
    weights = torch.randn_like(forward)
    weights[used:] = 0  # rows past the last expert's are nobody's
    got = torch.autograd.grad((forward * weights).sum(), hidden)
    expected = torch.autograd.grad((reference * weights).sum(), hidden)
    torch.testing.assert_close(got, expected)

    forward, reference = unpermute(rows, plan), unpermute_reference(rows, plan)
    torch.testing.assert_close(forward, reference)
    weights = torch.randn_like(forward)
    got = torch.autograd.grad((forward * weights).sum(), rows)
    expected = torch.autograd.grad((reference * weights).sum(), rows)
    torch.testing.assert_close(got, expected)


def test_tokens_with_few_rows_here_are_summed_like_the_reference():
    places = torch.full((50, 8), 4)  # 4 marks a choice that is elsewhere
    places[:, 3] = torch.arange(50) % 4
    places[:25, 6] = (torch.arange(25) + 1) % 4
    plan = plan_routed(places, 4, 75)
    rows = torch.randn(75, 6, requires_grad=True)
    forward, reference = unpermute(rows, plan), unpermute_reference(rows, plan)
    torch.testing.assert_close(forward, reference)
    assert plan.kept is not None
    on_a_gpu = sum_without_waiting(rows, plan.row_of_assignment, plan.kept)
    torch.testing.assert_close(on_a_gpu, reference)
    got, expected = (torch.autograd.grad(sums.square().sum(), rows) for sums in (forward, reference))
    torch.testing.assert_close(got, expected)


def test_a_token_without_a_row_here_gets_zero_whatever_the_unused_rows_hold():
    places = torch.tensor([[2, 2], [0, 2], [2, 2], [1, 0], [2, 2]])  # 2: elsewhere
    plan = plan_routed(places, 2, 3)  # rows: token 1, then token 3, both of place 0; then token 3 of place 1
    rows = torch.tensor([[1.0], [2.0], [4.0], [torch.nan]])
    assert sum_by_token(rows, plan).tolist() == [[0], [1], [0], [6], [0]]
