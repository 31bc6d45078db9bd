import pytest
import torch

from moe.ops.permute import permute, permute_reference, plan_permutation, unpermute, unpermute_reference

ROUTINGS = {
    "random": lambda: torch.rand(16, 8).topk(3, dim=1).indices,
    "all on one expert": lambda: torch.full((16, 1), 5),
    "empty experts": lambda: torch.tensor([[7, 0]] * 9),
    "one token": lambda: torch.tensor([[2, 1]]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_unpermute_undoes_permute(routing):
    indices = ROUTINGS[routing]()
    hidden = torch.randn(indices.shape[0], 4)
    plan = plan_permutation(indices, 8, torch.ones(indices.shape))
    back = unpermute(permute(hidden, plan), plan)
    assert torch.equal(back, hidden[:, None].expand_as(back))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_sorted_by_expert_and_counted(routing):
    indices = ROUTINGS[routing]()
    plan = plan_permutation(indices, 8, torch.ones(indices.shape))
    experts_of_rows = indices.flatten()[plan.assignment_of_row]
    assert experts_of_rows.tolist() == sorted(indices.flatten().tolist())
    assert plan.tokens_per_expert.tolist() == [int((indices == expert).sum()) for expert in range(8)]


@pytest.mark.parametrize("capacity", [None, 1, 3, 100])
def test_both_directions_equal_their_references_with_gradients(capacity):
    torch.manual_seed(1)
    indices, gates = torch.rand(12, 5).topk(2, dim=1).indices, torch.rand(12, 2)
    plan = plan_permutation(indices, 5, gates, capacity)
    hidden = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(plan.assignment_of_row), 3, dtype=torch.float64, requires_grad=True)
    used = int(plan.tokens_per_expert.sum())

    forward, reference = permute(hidden, plan), permute_reference(hidden, plan)
    torch.testing.assert_close(forward, reference, rtol=0, atol=0)
    weights = torch.randn_like(forward)
    weights[used:] = 0  # rows past the last expert's are nobody's
    got = torch.autograd.grad((forward * weights).sum(), hidden)
    expected = torch.autograd.grad((reference * weights).sum(), hidden)
    torch.testing.assert_close(got, expected)

    forward, reference = unpermute(rows, plan), unpermute_reference(rows, plan)
    torch.testing.assert_close(forward, reference, rtol=0, atol=0)
    weights = torch.randn_like(forward)
    got = torch.autograd.grad((forward * weights).sum(), rows)
    expected = torch.autograd.grad((reference * weights).sum(), rows)
    torch.testing.assert_close(got, expected)


def test_capacity_keeps_the_highest_gate_weights_of_hand_written_routing():
    indices = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])
    gates = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.6, 0.4]])
    plan = plan_permutation(indices, 3, gates, expert_capacity=2)
    # Expert 0 is asked for by gates .9 .5 .7 .4 and keeps .9 .7; expert 1 by .1 .5 .6 and keeps .5 .6.
    assert plan.kept.tolist() == [[True, False], [False, True], [True, True], [True, False]]
    assert plan.tokens_per_expert.tolist() == [2, 2, 1]


def test_equal_gate_weights_keep_first_choices_before_second_ones_then_earlier_tokens():
    indices = torch.tensor([[1, 0], [0, 1], [0, 1]])
    plan = plan_permutation(indices, 2, torch.full((3, 2), 0.5), expert_capacity=2)
    assert plan.kept.tolist() == [[True, False], [True, True], [True, False]]


def test_kept_and_dropped_make_all_assignments():
    for seed in range(20):
        torch.manual_seed(seed)
        indices, gates = torch.rand(30, 6).topk(2, dim=1).indices, torch.rand(30, 2)
        for capacity in (1, 4, 10, 60):
            plan = plan_permutation(indices, 6, gates, capacity)
            counts = torch.bincount(indices.flatten(), minlength=6)
            assert plan.tokens_per_expert.tolist() == [min(count, capacity) for count in counts.tolist()]
            assert int(plan.kept.sum()) == int(plan.tokens_per_expert.sum())


def test_a_dropped_assignment_never_touches_undefined_rows():
    plan = plan_permutation(torch.tensor([[0], [0], [1]]), 3, torch.tensor([[0.1], [0.9], [0.5]]), 1)
    rows = torch.full((len(plan.assignment_of_row), 2), float("nan"))
    rows[: int(plan.tokens_per_expert.sum())] = 7
    rows.requires_grad_()
    back = unpermute(rows, plan)
    assert back[:, 0, 0].tolist() == [0, 7, 7]
    (gradient,) = torch.autograd.grad(back.sum(), rows)
    assert gradient[:, 0].tolist() == [1, 1, 0]
