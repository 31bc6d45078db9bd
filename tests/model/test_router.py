"""Which experts the router picks, and with what weights."""

import math

import pytest
import torch

from moe.config import MoEConfig
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from tests.support.models import gradient_of


def make_router(top_k, normalize, num_experts=4, dtype=torch.float32):
    torch.manual_seed(0)
    router = Router(8, MoEConfig(num_experts=num_experts, top_k=top_k, normalize_gate_weights=normalize))
    with torch.no_grad():
        router.weight.normal_()
    return router.to(dtype)


def test_hand_written_logits_give_hand_worked_gates():
    router = Router(3, MoEConfig(num_experts=3, top_k=2))
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
        Router(8, MoEConfig(num_experts=4, top_k=1))


def test_sizes_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="d_model should be at least 1, got 0"):
        Router(0, MoEConfig())
    with pytest.raises(ValueError, match=r"top_k \(5\) is more than num_experts \(4\)"):
        Router(8, MoEConfig(num_experts=4, top_k=5))


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
    router = Router(2, MoEConfig(num_experts=3, top_k=1, normalize_gate_weights=False)).to(torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[8.0, 0.0], [8.0, 2.0**-7], [0.0, 0.0]]))
    out = router(torch.ones(1, 2, dtype=torch.bfloat16))
    assert out.expert_indices.tolist() == [[1]]
    odds = out.router_probs[0, 1] / out.router_probs[0, 0]
    assert odds.item() == pytest.approx(math.exp(2.0**-7), rel=1e-5)


def test_exact_ties_still_choose_distinct_experts():
    router = Router(8, MoEConfig(num_experts=4, top_k=3))
    with torch.no_grad():
        router.weight.zero_()
    indices = router(torch.randn(10, 8)).expert_indices
    assert all(len(set(row)) == 3 for row in indices.tolist())


class OwnRouter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 4)
        self.register_buffer("calls", torch.tensor(3))


@pytest.mark.parametrize("own", [None, OwnRouter])
def test_any_router_stays_in_fp32_when_the_layer_is_rounded(own):
    torch.manual_seed(0)
    layer = MoELayer(8, MoEConfig(num_experts=4, d_ff_expert=16, bias_update_rate=0.1))
    layer.router = own() if own else layer.router
    before = {name: value.clone() for name, value in layer.router.state_dict().items()}
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 8))
    for rounded in (model.bfloat16(), model.half(), model.to(torch.bfloat16), model.to("cpu", torch.float16)):
        assert rounded[1].weight.dtype in {torch.bfloat16, torch.float16}
        assert layer.experts.w_up.dtype == rounded[1].weight.dtype
        for name, value in layer.router.state_dict().items():
            assert torch.equal(value, before[name]), "not one bit changes"
            assert value.dtype == before[name].dtype
    assert {weight.dtype for weight in model.double().parameters()} == {torch.float64}
    assert all(weight.is_meta for weight in model.to("meta").state_dict().values())
