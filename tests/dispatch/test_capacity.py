"""How many assignments an expert takes, and which ones are dropped beyond that."""

import pytest
import torch
from torch import Tensor

from moe.dispatch.capacity import expert_capacity, plan_with_capacity
from moe.dispatch.permutation import Permutation, count_assignments, unpermute


def planned(indices: Tensor, num_experts: int, gates: Tensor, capacity: int) -> tuple[Permutation, Tensor]:
    """The plan, and which assignments it keeps."""
    plan = plan_with_capacity(indices, count_assignments(indices, num_experts), gates, capacity)
    assert plan.kept is not None
    return plan, plan.kept


def test_capacity_is_the_exact_ceiling_with_no_minimum():
    assert expert_capacity(1.0, 64, 1, 8) == 8
    assert expert_capacity(1.25, 64, 2, 8) == 20
    assert expert_capacity(1.09, 100, 1, 1) == 109  # 1.09 * 100 is 109.00000000000001 in binary
    assert expert_capacity(0.01, 8, 1, 8) == 1
    assert expert_capacity(1.0, 9, 2, 8) == 3  # an even share is 2.25


def test_capacity_keeps_the_highest_gate_weights_of_hand_written_routing():
    indices = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    gates = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.6, 0.4]])
    plan, kept = planned(indices, 3, gates, 2)
    # Expert 0 is asked for by gates .9 .5 .7 .4 and keeps .9 .7; expert 1 by .1 .5 .6 and keeps .5 .6.
    assert kept.tolist() == [[True, False], [False, True], [True, True], [True, False]]
    assert plan.rows_per_expert.tolist() == [2, 2, 1]


def test_equal_gate_weights_keep_first_choices_before_second_ones_then_earlier_tokens():
    indices = torch.tensor([[1, 0], [0, 1], [0, 1]])
    _, kept = planned(indices, 2, torch.full((3, 2), 0.5), 2)
    assert kept.tolist() == [[True, False], [True, True], [True, False]]


def test_kept_and_dropped_make_all_assignments():
    for seed in range(20):
        torch.manual_seed(seed)
        indices, gates = torch.rand(30, 6).topk(2, dim=1).indices, torch.rand(30, 2)
        for capacity in (1, 4, 10, 60):
            plan, kept = planned(indices, 6, gates, capacity)
            counts = torch.bincount(indices.flatten(), minlength=6)
            assert plan.rows_per_expert.tolist() == [min(count, capacity) for count in counts.tolist()]
            assert int(kept.sum()) == int(plan.rows_per_expert.sum())


@pytest.mark.parametrize("capacity", [1, 4, 10, 60])
def test_rows_are_sorted_by_expert_and_hold_the_kept_assignments_and_no_others(capacity):
    torch.manual_seed(0)
    indices, gates = torch.rand(30, 6).topk(2, dim=1).indices, torch.rand(30, 2)
    plan, kept = planned(indices, 6, gates, capacity)
    used = int(plan.rows_per_expert.sum())
    in_rows = plan.assignment_of_row[:used]
    experts_of_rows = indices.flatten()[in_rows].tolist()
    assert experts_of_rows == sorted(experts_of_rows)
    assert sorted(in_rows.tolist()) == kept.flatten().nonzero().flatten().tolist()
    assert plan.row_of_assignment.flatten()[in_rows].tolist() == list(range(used))
    assert len(plan.assignment_of_row) == min(60, 6 * capacity)


def test_a_dropped_assignment_never_touches_undefined_rows():
    plan, _ = planned(torch.tensor([[0], [0], [1]]), 3, torch.tensor([[0.1], [0.9], [0.5]]), 1)
    rows = torch.full((len(plan.assignment_of_row), 2), float("nan"))
    rows[: int(plan.rows_per_expert.sum())] = 7
    rows.requires_grad_()
    back = unpermute(rows, plan)
    assert back[:, 0].tolist() == [0, 7, 7]
    (gradient,) = torch.autograd.grad(back.sum(), rows)
    assert gradient[:, 0].tolist() == [1, 1, 0]
