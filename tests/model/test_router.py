"""Which experts the router picks, and with what weights."""

import math

import pytest
import torch

from moe.model.router import Router
from tests.support.models import gradient_of


def make_router(top_k, normalize, num_experts=4, dtype=torch.float32):
    torch.manual_seed(0)
    router = Router(8, num_experts, top_k, normalize)
    with torch.no_grad():
        router.weight.normal_()
    return router.to(dtype)


def test_hand_written_logits_give_hand_worked_gates():
    router = Router(3, 3, 2, normalize_gate_weights=True)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    out = router(torch.tensor([[4.0, 1.0, 2.0]]).log())  # softmax: 4/7, 1/7, 2/7
    assert out.expert_indices.tolist() == [[0, 2]]
    torch.testing.assert_close(out.gate_weights, torch.tensor([[4 / 6, 2 / 6]]))
    router.normalize_gate_weights = False
    torch.testing.assert_close(
        router(torch.tensor([[4.0, 1.0, 2.0]]).log()).gate_weights, torch.tensor([[4 / 7, 2 / 7]])
    )


@pytest.mark.parametrize("top_k", [2, 3, 4])
def test_normalised_gate_weights_sum_to_one(top_k):
    router, tokens = make_router(top_k, True), torch.randn(50, 8)
    torch.testing.assert_close(router(tokens).gate_weights.sum(1), torch.ones(50))
    assert torch.equal(router(tokens).gate_weights, router.eval()(tokens).gate_weights)


@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, False), (2, True), (3, True), (4, True)])
def test_the_router_learns_from_the_main_loss_for_every_k(top_k, normalize):
    router = make_router(top_k, normalize)
    out = router(torch.randn(50, 8))
    values = torch.randn(4)  # what each expert would contribute
    (out.gate_weights * values[out.expert_indices]).sum().backward()
    assert gradient_of(router.weight).abs().max() > 1e-3


def test_top_1_with_normalisation_is_refused():
    with pytest.raises(ValueError, match="constant 1"):
        Router(8, 4, 1, normalize_gate_weights=True)


def test_sizes_below_1_are_refused():
    for name, sizes in {"d_model": (0, 4, 2), "num_experts": (8, 0, 2), "top_k": (8, 4, 0)}.items():
        with pytest.raises(ValueError, match=f"{name} should be at least 1, got 0"):
            Router(*sizes, normalize_gate_weights=False)


def test_the_router_computes_in_fp32_under_bf16():
    router = make_router(2, True, dtype=torch.bfloat16)
    hidden = torch.randn(20, 8, dtype=torch.bfloat16)
    out = router(hidden)
    assert {out.router_logits.dtype, out.router_probs.dtype, out.gate_weights.dtype} == {torch.float32}
    expected = hidden.double() @ router.weight.double().T
    torch.testing.assert_close(out.router_logits.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.router_probs.double(), expected.softmax(1), rtol=1e-5, atol=1e-6)
    best = expected.softmax(1).topk(2).values
    gates = best / best.sum(1, keepdim=True)
    torch.testing.assert_close(out.gate_weights.double(), gates, rtol=1e-5, atol=1e-6)


def test_logits_that_bf16_cannot_tell_apart_are_told_apart_under_bf16():
    """8 + 2^-7 and 8 are the same number in bf16; as products of bf16 numbers, fp32 has both exactly."""
    router = Router(2, 3, 1, normalize_gate_weights=False).to(torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[8.0, 0.0], [8.0, 2.0**-7], [0.0, 0.0]]))
    out = router(torch.ones(1, 2, dtype=torch.bfloat16))
    assert out.expert_indices.tolist() == [[1]]
    odds = out.router_probs[0, 1] / out.router_probs[0, 0]
    assert odds.item() == pytest.approx(math.exp(2.0**-7), rel=1e-5)


def test_exact_ties_still_choose_distinct_experts():
    router = Router(8, 4, 3, normalize_gate_weights=True)
    with torch.no_grad():
        router.weight.zero_()
    indices = router(torch.randn(10, 8)).expert_indices
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_a_router_stays_in_fp32_when_the_model_is_rounded():
    torch.manual_seed(0)
    router = Router(8, 4, 2, normalize_gate_weights=True)
    torch.nn.init.normal_(router.weight)
    before = router.weight.detach().clone()
    model = torch.nn.Sequential(router, torch.nn.Linear(8, 8))
    for rounded in (model.bfloat16(), model.half(), model.to(torch.bfloat16), model.to("cpu", torch.float16)):
        assert {weight.dtype for weight in rounded[1].parameters()} < {torch.bfloat16, torch.float16}
        assert torch.equal(router.weight, before), "not one bit changes"
    assert model.double()[0].weight.dtype == torch.float64
    assert model.to("meta")[0].weight.is_meta
