"""Each rule of routing against a few lines written from its paper, for values and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import Config, ConfigError, ModelConfig, MoEConfig, parse_config
from moe.dispatch.interface import TokenContext
from moe.model.dropout import dropout_keys
from moe.model.moe_layer import MoELayer
from moe.model.router_rules import find_router, make_router
from moe.model.transformer import Transformer
from tests.support.models import gradient_of

D, S, B = 8, 6, 3
EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}


def routed(rule, hidden=None, train=True, keys=None, ids=None, **settings: Any):
    """A router with weights of size 1 and what it makes of 18 tokens."""
    torch.manual_seed(0)
    moe = MoEConfig(**({"router": rule, "num_experts": 8} | settings))
    router: Any = make_router(D, moe).train(train)
    for weight in router.parameters():
        torch.nn.init.normal_(weight)
    hidden = torch.randn(B * S, D) if hidden is None else hidden
    return router, hidden, router(hidden, TokenContext(S, ids, keys))


def dense_gates(output) -> Tensor:
    """(T, E): the gate weight of each expert, 0 where a token does not go."""
    tokens, experts = output.router_probs.shape
    gates = torch.zeros(tokens, experts + 1).scatter(1, output.expert_indices, output.gate_weights)
    return gates[:, :experts]


def check_against(router, hidden, output, expected, names=("weight",)):
    """The gates of all experts, and the gradients of what they would add up, equal those of `expected`."""
    torch.testing.assert_close(dense_gates(output), expected, **EXACT)
    contributions = torch.randn(expected.shape)
    for name in names:
        weight = getattr(router, name)
        own = torch.autograd.grad((dense_gates(output) * contributions).sum(), weight, retain_graph=True)[0]
        by_paper = torch.autograd.grad((expected * contributions).sum(), weight, retain_graph=True)[0]
        assert by_paper.abs().max() > 1e-3
        torch.testing.assert_close(own, by_paper, rtol=1e-5, atol=1e-6)


def test_topk_with_a_scale_multiplies_every_gate():
    router, hidden, output = routed("topk", top_k=3, route_scale=2.5)
    expected = torch.zeros(B * S, 8)
    for t, probs in enumerate((hidden @ router.weight.T).softmax(1)):
        best = sorted(range(8), key=lambda e: -probs[e].item())[:3]
        for e in best:
            expected[t, e] = 2.5 * probs[e] / sum(probs[i] for i in best)
    check_against(router, hidden, output, expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_scores_are_normalized_over_the_chosen_as_in_deepseek_v3(normalize):
    router, hidden, output = routed("sigmoid", top_k=3, normalize_gate_weights=normalize, route_scale=2.0)
    scores = 1 / (1 + torch.exp(-(hidden @ router.weight.T)))
    expected = torch.zeros(B * S, 8)
    for t in range(B * S):
        best = sorted(range(8), key=lambda e: -scores[t, e].item())[:3]
        for e in best:
            expected[t, e] = 2 * scores[t, e] / (sum(scores[t, i] for i in best) if normalize else 1)
    check_against(router, hidden, output, expected)
    torch.testing.assert_close(output.router_probs, scores / scores.sum(1, keepdim=True))
    assert routed("sigmoid", hidden - 1e4 * router.weight.sum(0), top_k=3)[2].gate_weights.isfinite().all()


def test_group_limited_routing_of_hand_written_scores():
    """Groups (0.9, 0.1), (0.6, 0.5), (0.7, 0.2) and (0.1, 0.3): the two best are 1 with 1.1 and 0 with 1.0.

    So expert 4, with 0.7 the second best of all, is out, and -inf keeps 0 scores of other groups out.
    """
    router: Any = make_router(
        8, MoEConfig(router="group_limited", num_experts=8, top_k=3, num_groups=4, top_groups=2)
    )
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.7, 0.2, 0.1, 0.3]])
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    output = router(scores.logit())
    assert output.expert_indices.tolist() == [[0, 2, 3]]
    torch.testing.assert_close(output.gate_weights, torch.tensor([[0.9, 0.6, 0.5]]) / 2.0)


def test_a_bias_moves_groups_and_experts_but_no_gate():
    settings: dict[str, Any] = {
        "num_experts": 8,
        "top_k": 3,
        "num_groups": 4,
        "top_groups": 2,
        "bias_update_rate": 0.1,
    }
    router: Any = make_router(8, MoEConfig(router="group_limited", **settings))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    router.expert_bias[:] = torch.tensor([0, 0, 0, -1.0, 0, 0, 0, 0])  # group 1 has 0.6 - 0.5, group 2 0.9
    output = router(torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.7, 0.2, 0.1, 0.3]]).logit())
    assert output.expert_indices.tolist() == [[0, 4, 5]]
    torch.testing.assert_close(output.gate_weights, torch.tensor([[0.9, 0.7, 0.2]]) / 1.8)


def test_experts_of_other_groups_are_out_even_if_all_biased_scores_are_below_0():
    settings: dict[str, Any] = {"num_experts": 8, "top_k": 3, "num_groups": 4, "top_groups": 2}
    router: Any = make_router(8, MoEConfig(router="group_limited", bias_update_rate=0.1, **settings))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    router.expert_bias -= 2
    output = router(torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.7, 0.2, 0.1, 0.3]]).logit())
    assert output.expert_indices.tolist() == [[0, 2, 3]]


def test_the_noise_of_each_layer_is_its_own_and_follows_from_the_keys():
    moe = MoEConfig(router="noisy_topk", num_experts=8, d_ff_expert=8)
    model = Transformer(Config(model=ModelConfig(d_model=8, n_layers=2, n_heads=2, vocab_size=50), moe=moe))
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("router"):
            for weight in module.parameters():
                torch.nn.init.zeros_(weight)  # so that the logits are noise of size log 2
            module.register_forward_hook(lambda *arguments: seen.append(arguments[2].router_logits))
    for step in (0, 0, 1):
        model(torch.arange(12).view(2, 6), dropout_keys=dropout_keys(0, step, [4, 9]))
    first, second, again, _, other, _ = seen
    assert (first != second).all()
    assert torch.equal(first, again)
    assert (first != other).all()


@pytest.mark.parametrize("rule", ["topk", "sigmoid", "noisy_topk"])
def test_a_bias_of_0_is_no_bias_and_another_changes_the_choice_only(rule):
    _, hidden, plain = routed(rule, train=False)
    router, _, biased = routed(rule, train=False, hidden=hidden, bias_update_rate=0.1)
    for one, other in zip(plain[:4], biased[:4], strict=True):
        assert torch.equal(one, other)
    router.expert_bias[5] = 10.0
    output = router(hidden)
    assert (output.expert_indices == 5).any(1).all()
    assert torch.equal(output.router_probs, plain.router_probs)
    same = output.expert_indices == plain.expert_indices
    scores = {"sigmoid": output.router_logits.sigmoid()}.get(rule, output.router_probs)
    chosen = scores.gather(1, output.expert_indices)
    torch.testing.assert_close(output.gate_weights, chosen / chosen.sum(1, keepdim=True))
    assert not same.all()


def test_switch_scales_the_input_by_noise_in_training_only():
    """One expert, whose probability of the noisy logits is the gate; the noise is uniform in 1 +- 0.1."""
    router, hidden, quiet = routed("switch", train=False, top_k=1, normalize_gate_weights=False)
    probs = (hidden @ router.weight.T).softmax(1)
    best = probs.argmax(1, keepdim=True)
    check_against(router, hidden, quiet, torch.zeros_like(probs).scatter(1, best, probs.gather(1, best)))
    many = torch.eye(D).repeat(B * S * 100, 1)
    moe = MoEConfig(router="switch", num_experts=D, top_k=1, normalize_gate_weights=False, router_jitter=0.1)
    noisy: Any = make_router(D, moe)
    with torch.no_grad():
        noisy.weight.copy_(torch.eye(D))
    noise = noisy(many).router_logits[many.bool()]  # the logit of input 1 under the identity is its noise
    assert 0.9 <= noise.min() < 0.901
    assert 1.099 < noise.max() <= 1.1
    assert noise.mean().item() == pytest.approx(1, abs=0.002)
    assert noise.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.02)


def test_noisy_topk_is_that_of_shazeer():
    """H(x) = x w + n softplus(x w_noise), and a softmax over the K largest of it."""
    keys = dropout_keys(0, 0, range(B))
    router, hidden, output = routed("noisy_topk", keys=keys, top_k=3)
    size = torch.log1p(torch.exp(hidden @ router.w_noise.T))
    noise = ((output.router_logits - hidden @ router.weight.T) / size).detach()
    noisy = hidden @ router.weight.T + noise * size
    kept = torch.full_like(noisy, -math.inf).scatter(1, noisy.topk(3).indices, noisy.topk(3).values)
    check_against(router, hidden, output, kept.softmax(1), ["weight", "w_noise"])
    many = [
        routed("noisy_topk", keys=dropout_keys(0, step, range(B)), hidden=hidden)[2] for step in range(200)
    ]
    draws = torch.stack([(each.router_logits - hidden @ router.weight.T) / size for each in many]).detach()
    assert draws.mean().item() == pytest.approx(0, abs=0.02)
    assert draws.std().item() == pytest.approx(1, rel=0.02)
    assert (draws.abs() < 1.96).float().mean().item() == pytest.approx(0.95, abs=0.01)
    quiet = routed("noisy_topk", train=False, hidden=hidden, top_k=3)[2]
    torch.testing.assert_close(quiet.router_logits, hidden @ router.weight.T)


@pytest.mark.parametrize("rule", ["switch", "noisy_topk"])
def test_noise_depends_on_seed_step_and_sample_and_not_on_the_batch(rule):
    settings = {"top_k": 1, "normalize_gate_weights": False} if rule == "switch" else {}
    _, hidden, whole = routed(rule, keys=dropout_keys(3, 7, [5, 6, 7]), **settings)
    router, _, again = routed(rule, hidden=hidden, keys=dropout_keys(3, 7, [5, 6, 7]), **settings)
    assert torch.equal(whole.router_logits, again.router_logits)
    alone = router(hidden[S : 2 * S], TokenContext(S, None, dropout_keys(3, 7, [6])))
    torch.testing.assert_close(alone.router_logits, whole.router_logits[S : 2 * S])
    for others in (
        dropout_keys(4, 7, [5, 6, 7]),
        dropout_keys(3, 8, [5, 6, 7]),
        dropout_keys(3, 7, [8, 9, 10]),
    ):
        other = router(hidden, TokenContext(S, None, others)).router_logits
        assert (other != whole.router_logits).all(1).all()
    unkeyed = [router(hidden, TokenContext(S)).router_logits for _ in range(2)]
    assert not torch.equal(*unkeyed)


@pytest.mark.parametrize("experts", [4, 5])
def test_expert_choice_is_that_of_zhou_and_fills_every_expert(experts):
    """Each expert takes its C = ceil(S K / E) best tokens of each sequence, by its column of the softmax."""
    router, hidden, output = routed("expert_choice", num_experts=experts, top_k=2, allow_causal_leak=True)
    capacity = math.ceil(S * 2 / experts)
    probs = (hidden @ router.weight.T).softmax(1)
    expected = torch.zeros(B * S, experts)
    for b in range(B):
        for e in range(experts):
            of_sequence = range(b * S, (b + 1) * S)
            for t in sorted(of_sequence, key=lambda t: -probs[t, e].item())[:capacity]:
                expected[t, e] = probs[t, e]
    check_against(router, hidden, output, expected)
    assert output.num_assignments == B * experts * capacity
    assert ((expected > 0).sum(0) == B * capacity).all()


def test_a_layer_of_expert_choice_is_the_sum_over_experts_and_their_tokens():
    torch.manual_seed(0)
    moe = MoEConfig(router="expert_choice", allow_causal_leak=True, num_experts=4, top_k=2, d_ff_expert=16)
    layer = MoELayer(D, moe)
    torch.nn.init.normal_(layer.router.weight)
    hidden = torch.randn(B, S, D)
    output, aux = layer(hidden)
    assert aux is not None
    assert aux.tokens_per_expert.tolist() == [B * S * 2 // 4] * 4
    gates = dense_gates(layer.router(hidden.flatten(0, 1), TokenContext(S)))
    assert (gates > 0).sum(1).unique().numel() > 1, "tokens with different numbers of experts"
    experts, rows, expected = layer.experts, hidden.flatten(0, 1), torch.zeros(B * S, D)
    for e in range(4):
        inner = torch.nn.functional.silu(rows @ experts.w_gate[e]) * (rows @ experts.w_up[e])
        expected += gates[:, e : e + 1] * (inner @ experts.w_down[e])
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-4, atol=1e-6)
    output.square().sum().backward()
    assert all(gradient_of(weight).isfinite().all() for weight in layer.parameters())


def leaks(rule, **settings):
    """Whether the logits of the first tokens change when the last token does."""
    model = Config(
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=50),
        moe=MoEConfig(router=rule, num_experts=4, d_ff_expert=16, **settings),
    )
    transformer = Transformer(model).eval()
    for name, weight in transformer.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(weight)
    tokens = torch.arange(20)[None]
    logits = transformer(tokens).logits
    for last in range(20, 50):
        other = transformer(torch.cat([tokens[:, :-1], torch.tensor([[last]])], 1)).logits
        if not torch.allclose(other[:, :-1], logits[:, :-1], atol=1e-5):
            return True
    return False


def test_expert_choice_leaks_the_future_and_is_refused_without_a_word():
    assert leaks("expert_choice", allow_causal_leak=True)
    assert not leaks("topk")
    with pytest.raises(ConfigError, match="leaks the future"):
        parse_config({"moe": {"router": "expert_choice"}})


def test_hash_routing_depends_on_the_token_alone_and_spreads_tokens():
    ids = torch.arange(4000)
    moe = MoEConfig(router="hash", num_experts=8, top_k=2, route_scale=3.0)
    router: Any = make_router(D, moe)
    assert not list(router.parameters())
    output = router(torch.randn(4000, D), TokenContext(4000, ids))
    again = router(torch.randn(2, D), TokenContext(2, torch.tensor([17, 3999])))
    assert output.expert_indices[[17, 3999]].tolist() == again.expert_indices.tolist()
    assert (output.expert_indices[:, 0] != output.expert_indices[:, 1]).all()
    assert output.gate_weights.unique().tolist() == [1.5]
    counts = torch.bincount(output.expert_indices.flatten(), minlength=8)
    assert (counts - 1000).abs().max() < 4 * math.sqrt(4000 * 0.25 * 0.75), "four standard deviations"
    pairs = {tuple(sorted(pair)) for pair in output.expert_indices.tolist()}
    assert len(pairs) == 28, "all pairs of experts occur"
    with pytest.raises(ValueError, match="hash needs token_ids"):
        router(torch.randn(2, D))


def test_uniform_routing_is_balanced_whatever_the_weights_and_gates_are_those_of_the_softmax():
    router, hidden, output = routed("uniform", num_experts=4, top_k=2)
    assert output.expert_indices[:S].tolist() == [[0, 1], [2, 3]] * 3
    assert output.expert_indices.tolist() == output.expert_indices[:S].tolist() * B
    expected = (hidden @ router.weight.T).softmax(1).gather(1, output.expert_indices)
    torch.testing.assert_close(output.gate_weights, expected / expected.sum(1, keepdim=True))


def test_a_router_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere_at_all:Router", "math:Router", "math:sqrt"):
        with pytest.raises(ConfigError, match=f"moe.router: {name} (cannot be imported|is not a class)"):
            find_router(name)


CONFLICTS = [
    ({"router": "top2"}, "moe.router: there is no rule 'top2'; use topk, sigmoid"),
    ({"router": "switch"}, "moe.top_k: moe.router=switch takes one expert, not 2"),
    ({"router": "noisy_topk", "top_k": 1}, "moe.top_k: .*the only gate weight would be 1"),
    ({"router": "expert_choice"}, "moe.router: expert_choice .*leaks the future"),
    (
        {"router": "expert_choice", "allow_causal_leak": True, "capacity_factor": 1.0},
        "moe.capacity_factor: expert_choice fills every expert exactly",
    ),
    ({"router": "hash", "bias_update_rate": 0.1}, "moe.bias_update_rate: hash chooses no experts"),
    (
        {"shared_expert_gate": True},
        "moe.shared_expert_gate: is for shared experts; set moe.num_shared_experts",
    ),
    ({"num_groups": 2}, "moe.num_groups: is for moe.router=group_limited, not topk"),
    ({"router": "group_limited"}, "moe.num_groups: moe.router=group_limited needs it"),
    ({"router": "group_limited", "num_groups": 3, "top_groups": 1}, "moe.num_groups: 3 does not divide"),
    ({"router": "group_limited", "num_groups": 2, "top_groups": 3}, "moe.top_groups: 3 is more than"),
    (
        {"router": "group_limited", "num_groups": 8, "top_groups": 1},
        "moe.top_groups: 1 groups have 1 experts, fewer than moe.top_k",
    ),
]


@pytest.mark.parametrize(("settings", "message"), CONFLICTS)
def test_settings_of_rules_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"moe": settings})
