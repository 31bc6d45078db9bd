"""What the experts do, against a recount of their routes in plain Python."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models

from moe.config import ConfigError, changed, parse_config
from moe.inference.routing_page import routing_page
from moe.inference.routing_statistics import LayerRouting, routing_statistics
from moe.inference.trained_run import TrainedRun
from moe.model.transformer import Transformer

SETTINGS = {
    "model": {"d_model": 16, "n_layers": 3, "n_heads": 2, "vocab_size": 20, "d_ff": 16},
    "moe": {"num_experts": 5, "top_k": 2, "d_ff_expert": 16, "first_dense_layers": 1},
}
TEXTS = {"code": torch.arange(9 * 7).view(9, 7) * 7 % 20, "prose": torch.arange(3 * 7).view(3, 7) * 3 % 11}


def make_run(seed=0, **moe: Any) -> TrainedRun:
    config = parse_config(SETTINGS | {"moe": SETTINGS["moe"] | moe, "run": {"seed": seed}})
    model = Transformer(config).eval()
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "router" in name or "embedding" in name:
            torch.nn.init.normal_(weight)
    return TrainedRun(model, Tokenizer(models.BPE()), config, 0)


def routes_of(run: TrainedRun, windows: torch.Tensor) -> dict[int, list[tuple[int, list[int], list[float]]]]:
    """By layer, for each token: its id, its experts, and all probabilities."""
    found: dict[int, Any] = {}
    for layer in (1, 2):
        router = run.model.get_submodule(f"blocks.{layer}.ffn.router")
        router.register_forward_hook(lambda *call, layer=layer: found.update({layer: call[2]}))
    with torch.no_grad():
        run.model(windows[:, :-1])
    ids = windows[:, :-1].flatten().tolist()
    return {
        layer: list(zip(ids, out.expert_indices.tolist(), out.router_probs.tolist(), strict=True))
        for layer, out in found.items()
    }


def test_every_figure_is_that_of_a_recount():
    routing = routing_statistics(make_run(), TEXTS)
    by_text = {name: routes_of(make_run(), windows) for name, windows in TEXTS.items()}
    assert [layer.layer for layer in routing.layers] == [1, 2]
    for layer in routing.layers:
        tokens = [token for routes in by_text.values() for token in routes[layer.layer]]
        assert layer.tokens == len(tokens) == 12 * 6
        for number, routes in enumerate(by_text.values()):
            loads = Counter(expert for _, experts, _ in routes[layer.layer] for expert in experts)
            assert layer.loads[number].tolist() == [loads[expert] for expert in range(5)]
        for one in range(5):
            for other in range(5):
                both = sum({one, other} <= set(experts) for _, experts, _ in tokens)
                assert layer.together[one, other] == both
            for token in range(20):
                times = sum(token == id_ and one in experts for id_, experts, _ in tokens)
                assert layer.by_token[token, one] == times
        best = [sorted(probs, reverse=True) for *_, probs in tokens]
        assert layer.top1 == pytest.approx(sum(probs[0] for probs in best) / 72, rel=1e-5)
        assert layer.margin == pytest.approx(sum(probs[0] - probs[1] for probs in best) / 72, rel=1e-5)
        entropy = -sum(p * math.log(p) for probs in best for p in probs) / 72
        assert layer.entropy == pytest.approx(entropy, rel=1e-5)
        assert layer.kept is None


def test_the_loss_is_the_mean_over_all_tokens():
    run = make_run()
    with torch.no_grad():
        nats = sum(float(run.model(each[:, :-1], targets=each[:, 1:]).nats) for each in TEXTS.values())
    assert routing_statistics(run, TEXTS).loss == pytest.approx(nats / 72, rel=1e-6)


def test_routes_kept_are_those_that_an_earlier_checkpoint_made_as_well():
    run, earlier = make_run(), make_run()
    assert {layer.kept for layer in routing_statistics(run, TEXTS, make_run()).layers} == {1.0}
    with torch.no_grad():
        earlier.model.get_parameter("blocks.2.ffn.router.weight").mul_(-1)
    first, second = routing_statistics(run, TEXTS, earlier).layers
    assert first.kept == 1.0
    now, before = (
        [set(experts) for each in TEXTS.values() for _, experts, _ in routes_of(which, each)[2]]
        for which in (run, earlier)
    )
    kept = sum(len(here & there) for here, there in zip(now, before, strict=True)) / (2 * 72)
    assert second.kept == pytest.approx(kept)
    assert kept < 0.9


def test_the_loss_without_an_expert_is_that_of_a_model_that_never_had_it():
    """Gate weights are normalized over the chosen, so a softmax over fewer experts changes none of them."""
    run = make_run(first_dense_layers=2)
    [layer] = routing_statistics(run, TEXTS, drop=5).layers
    assert sorted(layer.losses) == [0, 1, 2, 3, 4]
    for expert, loss in layer.losses.items():
        rest = [other for other in range(5) if other != expert]
        model = Transformer(changed(run.config, {"moe.num_experts": 4})).eval()
        model.load_state_dict(
            {
                name: weight[rest] if name.startswith("blocks.2.ffn.") else weight
                for name, weight in run.model.state_dict().items()
            }
        )
        with torch.no_grad():
            nats = sum(float(model(each[:, :-1], targets=each[:, 1:]).nats) for each in TEXTS.values())
        assert loss == pytest.approx(nats / 72, rel=1e-5)
    plain = routing_statistics(make_run(first_dense_layers=2), TEXTS).loss
    assert routing_statistics(run, TEXTS).loss == pytest.approx(plain, rel=1e-7), "the router is as before"


def test_a_layer_whose_experts_do_nothing_loses_nothing_without_any_of_them():
    run = make_run()
    with torch.no_grad():
        run.model.get_parameter("blocks.2.ffn.experts.w_down").zero_()
    routing = routing_statistics(run, TEXTS, drop=5)
    first, second = routing.layers
    assert set(second.losses.values()) == {routing.loss}
    assert routing.loss not in first.losses.values()


def test_the_least_used_experts_are_dropped_first():
    layer = routing_statistics(make_run(), TEXTS, drop=2).layers[0]
    loads = layer.loads.sum(0).tolist()
    assert max(loads[expert] for expert in layer.losses) <= sorted(loads)[1]


def test_favourites_are_the_tokens_of_which_most_go_to_an_expert():
    """Of 10, 8 and 4 occurrences 5, 8 and 4 go to expert 0; the last token is too rare."""
    by_token = torch.tensor([[5, 10, 5], [8, 8, 0], [4, 4, 0]], dtype=torch.int32)
    loads = by_token.sum(0, keepdim=True).long()
    layer = LayerRouting(0, loads, by_token, torch.zeros(3, 3).long(), tokens=22)
    assert layer.favourites(0, 5) == [(1, 1.0), (0, 0.5)]
    assert layer.favourites(0, 1) == [(1, 1.0)]
    assert layer.favourites(2, 5) == [(0, 0.5)]


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_experts": 1, "top_k": 1}, "RUN: is a dense model"),
        ({"router": "hash"}, "--drop: moe.router=hash cannot leave an expert out"),
        ({"top_k": 5}, "--drop: moe.router=topk cannot leave an expert out"),
    ],
)
def test_what_cannot_be_done_is_refused(moe, message):
    with pytest.raises(ConfigError, match=message):
        routing_statistics(make_run(**moe), TEXTS, drop=1)


def test_the_page_has_every_layer_and_text_and_loads_nothing():
    run = make_run()
    tokenizer = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(20)}, "<0>"))
    page = routing_page(
        routing_statistics(run, TEXTS, make_run(1), drop=1), "Experts of <this> run", tokenizer
    )
    assert "<h1>Experts of &lt;this&gt; run</h1>" in page
    for text in (
        "Layer 1",
        "Layer 2",
        "<th>code</th>",
        "<th>prose</th>",
        "loss if dropped",
        "<code title=",
        "&lt;",
    ):
        assert text in page, text
    assert page.count("data:image/png;base64,") == 2
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in page
