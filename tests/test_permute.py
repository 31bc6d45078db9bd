import pytest
import torch

from moe.dispatch.permutation import (
    permute,
    permute_reference,
    plan_permutation,
    plan_routed,
    unpermute,
    unpermute_reference,
)

ROUTINGS = {
    "random": lambda: torch.rand(16, 8).topk(3, dim=1).indices,
    "all on one expert": lambda: torch.full((16, 1), 5),
    "empty experts": lambda: torch.tensor([[7, 0]] * 9),
    "one token": lambda: torch.tensor([[2, 1]]),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_unpermute_brings_back_what_permute_copied(routing):
    indices = ROUTINGS[routing]()
    hidden = torch.randn(indices.shape[0], 4, dtype=torch.float64)
    plan = plan_permutation(indices, 8, torch.ones(indices.shape))
    rows = permute(hidden, plan)
    torch.testing.assert_close(unpermute(rows, plan), indices.shape[1] * hidden)
    only_last = torch.zeros(indices.shape)
    only_last[:, -1] = 0.5
    assert torch.equal(unpermute(rows, plan, only_last), 0.5 * hidden)


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

    for by in (None, torch.rand(12, 2, dtype=torch.float64, requires_grad=True)):
        forward, reference = unpermute(rows, plan, by), unpermute_reference(rows, plan, by)
        torch.testing.assert_close(forward, reference)
        weights, inputs = torch.randn_like(forward), [rows] if by is None else [rows, by]
        got = torch.autograd.grad((forward * weights).sum(), inputs)
        expected = torch.autograd.grad((reference * weights).sum(), inputs)
        torch.testing.assert_close(got, expected)


def test_tokens_with_few_rows_here_are_summed_like_the_reference_and_cost_few_rows():
    places = torch.full((50, 8), 4)  # 4 marks a choice that is elsewhere
    places[:, 3] = torch.arange(50) % 4
    plan = plan_routed(places, 4, 50)
    rows = torch.randn(50, 6, requires_grad=True)
    weights = torch.rand(50, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        forward = unpermute(rows, plan, weights)
    assert sum(kept) <= 50 * 6 + 50 * 8  # (T, K, D) would be 2,400
    reference = unpermute_reference(rows, plan, weights)
    torch.testing.assert_close(forward, reference)
    for got, expected in zip(
        torch.autograd.grad(forward.square().sum(), (rows, weights)),
        torch.autograd.grad(reference.square().sum(), (rows, weights)),
        strict=True,
    ):
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
    weights = torch.full((3, 1), 2.0, requires_grad=True)
    back = unpermute(rows, plan, weights)
    assert back[:, 0].tolist() == [0, 14, 14]
    for_rows, for_weights = torch.autograd.grad(back.sum(), (rows, weights))
    assert for_rows[:, 0].tolist() == [2, 2, 0]
    assert for_weights.flatten().tolist() == [0, 14, 14]
    (gradient,) = torch.autograd.grad(unpermute(rows, plan).sum(), rows)
    assert gradient[:, 0].tolist() == [1, 1, 0]
