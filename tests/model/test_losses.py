"""The cross-entropy, the auxiliary losses and the entropy of the router."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.model import losses
from moe.model.losses import cross_entropy, load_balancing_loss, router_entropy, router_z_loss


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_balance_loss_is_one_at_uniform_routing_for_every_k(top_k):
    num_experts = 8
    probs = torch.full((num_experts, num_experts), 1 / num_experts)
    # Token t takes experts t, t+1, ..., t+k-1 modulo E: every expert gets exactly k assignments.
    indices = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    assert load_balancing_loss(probs, indices).item() == 1.0


@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_balance_loss_is_the_number_of_experts_when_one_expert_gets_everything(num_experts):
    probs = torch.zeros(10, num_experts)
    probs[:, 3 % num_experts] = 1
    assert load_balancing_loss(probs, torch.full((10, 1), 3 % num_experts)).item() == num_experts


def test_balance_loss_of_a_hand_worked_batch():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    indices = torch.tensor([[0, 1], [1, 2]])
    # f = (1, 2, 1) / 4, P = (0.3, 0.45, 0.25): 3 * (0.075 + 0.225 + 0.0625) = 1.0875
    assert load_balancing_loss(probs, indices).item() == pytest.approx(1.0875, abs=1e-6)


def test_balance_loss_of_sequences_is_the_mean_of_theirs_and_no_grouping_changes_it():
    logits = torch.randn(4, 7, 6, dtype=torch.float64)
    probs, indices = logits.softmax(-1), logits.topk(2, dim=-1).indices
    alone = [load_balancing_loss(p, i) for p, i in zip(probs, indices, strict=True)]
    torch.testing.assert_close(load_balancing_loss(probs, indices), torch.stack(alone).mean())
    halves = [load_balancing_loss(probs[part], indices[part]) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(load_balancing_loss(probs, indices), torch.stack(halves).mean())


def test_opposite_sequences_are_not_balanced_together():
    probs = torch.zeros(2, 8, 2)
    probs[0, :, 0] = probs[1, :, 1] = 1
    indices = torch.tensor([[0], [1]]).expand(2, 8)[..., None]
    assert load_balancing_loss(probs, indices).item() == 2.0


def test_gradient_reaches_the_router_through_the_probabilities_only():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    indices = logits.topk(2, dim=1).indices
    load_balancing_loss(logits.softmax(1), indices).backward()
    share = torch.bincount(indices.flatten(), minlength=4) / 12
    probs = logits.detach().softmax(1)
    # d(E sum f_i mean_t p_ti)/d logit_tj = E / T * p_tj (f_j - sum_i f_i p_ti)
    expected = 4 / 6 * probs * (share - (probs * share).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected)


def test_z_loss_of_a_hand_worked_batch():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected, rel=1e-6)


def test_appending_padding_changes_neither_loss():
    torch.manual_seed(0)
    logits, padding = torch.randn(7, 4), torch.randn(5, 4) * 10
    indices = logits.topk(2, dim=1).indices
    both = torch.cat([logits, padding])
    both_indices = both.topk(2, dim=1).indices
    valid = torch.arange(12) < 7
    torch.testing.assert_close(
        load_balancing_loss(both.softmax(1), both_indices, valid),
        load_balancing_loss(logits.softmax(1), indices),
    )
    torch.testing.assert_close(router_z_loss(both, valid), router_z_loss(logits))


def test_two_layers_collapsed_on_different_experts_are_not_balanced():
    collapsed = []
    for expert in (0, 1):
        probs = torch.zeros(8, 2)
        probs[:, expert] = 1
        collapsed.append(load_balancing_loss(probs, torch.full((8, 1), expert)))
    assert torch.stack(collapsed).mean().item() == 2.0


def test_entropy_is_the_log_of_the_experts_when_undecided_and_zero_when_certain():
    assert router_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8), rel=1e-6)
    assert router_entropy(torch.eye(8)).item() == 0


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("logits_at_once", [1, 50, 120, 1000])  # chunks of 1, 5, 12 and all 23 tokens
def test_the_cross_entropy_of_chunks_is_that_of_all_logits_with_both_gradients(
    monkeypatch, logits_at_once, dtype
):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 6).to(dtype), torch.randn(10, 6).to(dtype)
    targets = torch.randint(0, 10, (23,))
    got, expected = [], []
    for results, function in ((got, cross_entropy), (expected, of_all_logits)):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(*inputs, targets) * 0.25
        results += [loss.detach(), *torch.autograd.grad(loss, inputs)]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(hidden, weight, targets) * 0.25, got[0])


def of_all_logits(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def test_of_no_tokens_it_is_zero():
    loss = cross_entropy(torch.zeros(0, 6), torch.ones(10, 6), torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0


def test_only_one_chunk_of_logits_exists_at_a_time(monkeypatch):
    """The largest tensor made is a chunk of logits, or a gradient of what is given."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 8 * 500)
    hidden = torch.randn(200, 4, requires_grad=True)
    weight = torch.randn(500, 4, requires_grad=True)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor))
            return made

    with Watch():
        cross_entropy(hidden, weight, torch.randint(0, 500, (200,))).backward()
    assert max(sizes) == 8 * 500


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4)])
def test_without_tokens_all_of_them_are_0(shape):
    probs = torch.zeros(shape)
    assert load_balancing_loss(probs, torch.zeros(*shape[:2], 2, dtype=torch.int64)) == 0
    assert router_z_loss(probs.flatten(0, 1)) == 0
    assert router_entropy(probs.flatten(0, 1)) == 0
