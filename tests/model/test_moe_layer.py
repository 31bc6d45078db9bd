"""The MoE layer against a loop over tokens and experts, written without any of its parts."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from moe.config import MoEConfig
from moe.dispatch.capacity import expert_capacity
from moe.dispatch.interface import RouterOutput, TokenContext
from moe.model.grouped_swiglu import ExpertPath
from moe.model.moe_layer import MoELayer
from moe.model.router import Router
from tests.support.models import gradient_of

D_MODEL = 16
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.float64: dict(rtol=1e-9, atol=1e-11),
}


def make_layer(path: ExpertPath | None = "loop", dtype=torch.float64, seed=0, **moe):
    settings: dict[str, Any] = {"num_experts": 6, "top_k": 2, "d_ff_expert": 24} | moe
    layer = MoELayer(D_MODEL, MoEConfig(**settings), expert_path=path, seed=seed).to(dtype)
    with torch.no_grad():
        layer.router.weight.mul_(30)  # decided routing, so that gate weights differ
    return layer


def naive_moe(layer, hidden, capacity_factor=None, top_k=2, normalize=True):
    """The layer from its definition: token by token, expert by expert, no sorting of rows, no stacking."""
    flat = hidden.reshape(-1, D_MODEL)
    weights = dict(layer.named_parameters())
    num_experts = weights["router.weight"].shape[0]
    choices = []  # (gate weight, choice, token, expert)
    for t, x in enumerate(flat):
        probs = (weights["router.weight"] @ x).softmax(0)
        best = sorted(range(num_experts), key=lambda e: -probs[e].item())[:top_k]
        total = sum(probs[e] for e in best) if normalize else 1
        choices += [(probs[e] / total, choice, t, e) for choice, e in enumerate(best)]
    if capacity_factor is not None:
        capacity = math.ceil(Fraction(str(capacity_factor)) * len(flat) * top_k / num_experts)
        by_expert = {}
        for entry in sorted(choices, key=lambda entry: (-entry[0].item(), entry[1], entry[2])):
            by_expert.setdefault(entry[3], []).append(entry)
        choices = [entry for entries in by_expert.values() for entry in entries[:capacity]]
    out = [torch.zeros_like(x) for x in flat]
    for gate, _, t, e in choices:
        up = torch.nn.functional.silu(flat[t] @ weights["experts.w_gate"][e]) * (
            flat[t] @ weights["experts.w_up"][e]
        )
        out[t] = out[t] + gate * (up @ weights["experts.w_down"][e])
    if "shared_experts.w_up" in weights:
        for t, x in enumerate(flat):
            gated = torch.nn.functional.silu(x @ weights["shared_experts.w_gate"])
            shared = (gated * (x @ weights["shared_experts.w_up"])) @ weights["shared_experts.w_down"]
            if "shared_gate.weight" in weights:
                shared = shared / (1 + torch.exp(-(weights["shared_gate.weight"] @ x)))
            out[t] = out[t] + shared
    return torch.stack(out).reshape(hidden.shape)


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("reference", torch.float64),
        ("loop", torch.float64),
        ("loop", torch.float32),
        ("grouped_mm", torch.float32),
    ],
)
@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0])
@pytest.mark.parametrize(
    "routing",
    [
        {"top_k": 2},
        {"top_k": 1, "normalize_gate_weights": False},
        {"top_k": 3, "normalize_gate_weights": False},
        {"top_k": 6, "num_shared_experts": 2},
        {"top_k": 5, "num_shared_experts": 1, "shared_expert_gate": True},
    ],
    ids=lambda routing: f"k{routing['top_k']}",
)
def test_layer_equals_a_per_token_loop_for_output_and_every_gradient(path, dtype, capacity_factor, routing):
    layer = make_layer(path, dtype, capacity_factor=capacity_factor, **routing)
    torch.manual_seed(3)
    hidden = torch.randn(2, 9, D_MODEL, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 9, D_MODEL, dtype=dtype)
    inputs = {"hidden": hidden, **dict(layer.named_parameters())}

    fast, _ = layer(hidden)
    naive = naive_moe(
        layer, hidden, capacity_factor, routing["top_k"], routing.get("normalize_gate_weights", True)
    )
    torch.testing.assert_close(fast, naive, **TOLERANCE[dtype])
    fast_grads = torch.autograd.grad(fast, list(inputs.values()), upstream)
    naive_grads = torch.autograd.grad(naive, list(inputs.values()), upstream, allow_unused=True)
    for name, got, expected in zip(inputs, fast_grads, naive_grads, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(
            got, expected, **TOLERANCE[dtype], msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
def test_gradcheck_on_a_tiny_layer(capacity_factor):
    layer = make_layer(num_experts=3, d_ff_expert=8, capacity_factor=capacity_factor)
    hidden = torch.randn(1, 4, D_MODEL, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def output(hidden, *values):
        out, aux = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), hidden)
        return out, aux.load_balancing_loss, aux.router_z_loss

    assert torch.autograd.gradcheck(output, (hidden, *values), atol=1e-6, fast_mode=True)


def test_permuting_the_experts_changes_nothing():
    layer, hidden = make_layer(num_shared_experts=1), torch.randn(2, 8, D_MODEL, dtype=torch.float64)
    before, aux_before = layer(hidden)
    order = torch.randperm(6)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if not name.startswith("shared"):
                weight.copy_(weight[order].clone())
    after, aux_after = layer(hidden)
    torch.testing.assert_close(after, before)
    assert aux_after.tokens_per_expert.tolist() == aux_before.tokens_per_expert[order].tolist()


@pytest.mark.parametrize("capacity_factor", [None, 0.25, 0.9, 4.0])
def test_kept_plus_dropped_is_every_assignment(capacity_factor):
    layer, hidden = (
        make_layer(capacity_factor=capacity_factor),
        torch.randn(3, 7, D_MODEL, dtype=torch.float64),
    )
    _, aux = layer(hidden)
    assert int(aux.tokens_per_expert.sum()) == 3 * 7 * 2
    if capacity_factor is None:
        assert int(aux.dropped_tokens) == 0
    else:
        capacity = expert_capacity(capacity_factor, 21, 2, 6)
        assert int(aux.dropped_tokens) == int((aux.tokens_per_expert - capacity).clamp(min=0).sum())


def test_nothing_is_dropped_in_evaluation_so_later_tokens_cannot_matter():
    layer = make_layer(capacity_factor=0.25).eval()
    hidden = torch.randn(1, 12, D_MODEL, dtype=torch.float64)
    whole, aux = layer(hidden)
    first_half, _ = layer(hidden[:, :6])
    assert int(aux.dropped_tokens) == 0
    torch.testing.assert_close(whole[:, :6], first_half)


@pytest.mark.parametrize("path", ["loop", "grouped_mm"])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_uninitialised_memory_never_leaks(monkeypatch, path, capacity_factor):
    def poisoned(make):
        def call(*arguments, **keywords):
            out = make(*arguments, **keywords)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(2**40)

        return call

    layer = make_layer(path, torch.float32, capacity_factor=capacity_factor)
    with torch.no_grad():
        layer.router.weight[2:] = -5  # experts 2 to 5 stay empty for positive inputs
        layer.router.weight[:2] = 5
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    torch.use_deterministic_algorithms(True)  # fills every torch.empty, those in C++ too, with NaN
    try:
        for _ in range(3):
            out, aux = layer(torch.rand(2, 8, D_MODEL))
            (out.square().sum() + aux.load_balancing_loss + aux.router_z_loss).backward()
            assert torch.isfinite(out).all()
            for name, parameter in layer.named_parameters():
                assert torch.isfinite(gradient_of(parameter)).all(), name
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= 1e-3 * gradient_of(parameter)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_expert_without_tokens_has_zero_gradients_not_none():
    layer = make_layer("grouped_mm", torch.float32)
    with torch.no_grad():
        layer.router.weight[2:] = -5
        layer.router.weight[:2] = 5
    layer(torch.rand(2, 8, D_MODEL))[0].sum().backward()
    assert gradient_of(layer.experts.w_up)[2:].abs().sum() == 0
    assert gradient_of(layer.experts.w_up)[:2].abs().sum() > 0


def test_hand_written_logits_give_the_hand_written_kept_set():
    """T = 4, K = 1, E = 2, factor 1: two slots each. Expert 0 is wanted by tokens 0, 1 and 3."""
    layer = make_layer(num_experts=2, top_k=1, normalize_gate_weights=False, capacity_factor=1.0)
    logits = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :2] = torch.eye(2)
    hidden = torch.cat([logits, torch.randn(4, D_MODEL - 2, dtype=torch.float64)], dim=1)[None]
    out, aux = layer(hidden)
    assert (out[0].abs().sum(1) > 0).tolist() == [True, True, True, False]  # token 3 has the lowest gate
    assert aux.tokens_per_expert.tolist() == [3, 1]
    assert int(aux.dropped_tokens) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", [None, "loop", "reference"])
def test_under_autocast_the_layer_computes_in_its_dtype_like_a_linear_and_the_router_in_fp32(path, dtype):
    """Against the same layer on rounded weights and tokens; fp64 stays, as it does in a Linear."""
    layer, hidden = make_layer(path, torch.float32, num_shared_experts=1), torch.randn(2, 9, D_MODEL)
    hidden = hidden.to(dtype).requires_grad_()
    rounded = make_layer(path, torch.float32, num_shared_experts=1).to(dtype)
    expected, expected_aux = rounded(hidden)
    for given in (hidden, hidden.float()):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            output, aux = layer(given)
            assert torch.equal(layer(given.detach())[0], output)
            with torch.no_grad():
                torch.testing.assert_close(layer(given)[0], output)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected)
        assert torch.equal(aux.router_z_loss, expected_aux.router_z_loss), "the router's logits"
        (output.float().sum() + aux.load_balancing_loss).backward()
        assert {gradient_of(weight).dtype for weight in layer.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        assert layer.double()(hidden.double())[0].dtype == torch.float64


class FixedRouter(torch.nn.Module):
    """Gives out what it was given."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, hidden: torch.Tensor, context: TokenContext) -> Any:
        return self.output


ROUTED = RouterOutput(torch.zeros(6, 2).long(), torch.ones(6, 2), torch.zeros(6, 4), torch.ones(6, 4) / 4)
_EXPERTS, _GATES = r"expert_indices should be \(6, 2\) of torch.int64", r"gate_weights should be \(6, 2\) of "


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (tuple(ROUTED), "what the router returns: should be of type RouterOutput, got tuple"),
        (ROUTED._replace(gate_weights=torch.ones(6, 4)), _GATES),
        (ROUTED._replace(gate_weights=torch.ones(2, 6)), _GATES),
        (ROUTED._replace(gate_weights=torch.ones(6, 2).bfloat16()), f"{_GATES}torch.float32, got .*bfloat16"),
        (ROUTED._replace(expert_indices=torch.zeros(6, 2).int()), f"{_EXPERTS}, got .* of torch.int32"),
        (ROUTED._replace(expert_indices=torch.zeros(5, 2).long()), _EXPERTS),
        (ROUTED._replace(router_logits=torch.zeros(6, 5)), r"router_logits should be \(6, 4\)"),
        (ROUTED._replace(router_probs=torch.zeros(6, 4).half()), r"router_probs .*, got .* of torch.float16"),
        (ROUTED._replace(expert_indices=torch.full((6, 2), 4)), "should be from 0 to 3, got 4 to 4"),
        (ROUTED._replace(expert_indices=torch.full((6, 2), -1)), "should be from 0 to 3, got -1 to -1"),
    ],
)
def test_what_a_router_of_ones_own_must_not_return_is_a_value_error(output, message):
    layer = make_layer(None, torch.float32, num_experts=4)
    layer.router = FixedRouter(ROUTED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 3, D_MODEL))
    layer.router = FixedRouter(output)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 3, D_MODEL))


def test_a_router_of_ones_own_computes_in_fp32_under_autocast():
    layer = make_layer(None, torch.float32)
    layer.router = type("OwnRouter", (Router,), {})(D_MODEL, MoEConfig(num_experts=layer.num_experts))
    layer.router.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    autocast: list[bool] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 3, D_MODEL))
    assert autocast == [False]


def test_a_batch_without_tokens_has_losses_of_0_and_gradients():
    layer = make_layer(None, torch.float32)
    for shape in ((0, 5, D_MODEL), (2, 0, D_MODEL)):
        output, aux = layer(torch.zeros(shape))
        assert (aux.load_balancing_loss, aux.router_z_loss, aux.router_entropy) == (0, 0, 0)
        (output.sum() + aux.load_balancing_loss + aux.router_z_loss).backward()
        assert all(not gradient_of(weight).any() for weight in layer.parameters())


def test_it_prints_its_sizes():
    text = str(make_layer(capacity_factor=1.5))
    assert "d_model=16, capacity_factor=1.5" in text
    assert "(router): Router(d_model=16, num_experts=6, top_k=2, normalize_gate_weights=True)" in text
    assert "(experts): GroupedExperts(num_experts=6, d_model=16, d_ff_expert=24, path=loop)" in text
