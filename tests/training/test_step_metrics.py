"""The losses and router metrics of a step, against hand-worked ones and a recount of its routes."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe.dispatch.interface import RouterOutput, TokenContext
from moe.model.moe_layer import MoEAux, MoELayer
from moe.training.loss import TrainingLoss
from moe.training.step_metrics import StepMeter
from tests.support.ranks import run_ranks
from tests.support.runs import read_lines
from tests.support.training import train_once


def loss_with(lm, counts, dropped=0, balance=1.0, entropy=0.5, sent=0, health=(0.25, 4.0, 3.0)):
    """A micro batch: its cross-entropy, assignments by layer and expert, and the rest of each layer."""
    layers = len(counts)
    aux = MoEAux(
        load_balancing_loss=torch.full((layers,), balance),
        router_z_loss=torch.full((layers,), 2.0),
        mean_probs=torch.full((layers, len(counts[0])), torch.nan),
        tokens_per_expert=torch.tensor(counts),
        dropped_tokens=torch.tensor([dropped] * layers),
        router_entropy=torch.full((layers,), entropy),
        health=torch.tensor([health] * layers),
        dispatch_bytes=torch.full((layers,), sent),
    )
    return TrainingLoss(torch.tensor(float("nan")), torch.tensor(lm), aux)  # no metric is of the total


def entropy_of(*shares):
    return -sum(share * math.log(share) for share in shares) / math.log(4)


def test_router_metrics_of_a_hand_worked_step():
    meter = StepMeter(torch.device("cpu"))
    first = loss_with(3.0, [[4, 0, 0, 0], [1, 1, 1, 1]], dropped=1, balance=2.0, entropy=1.0, sent=5)
    meter.add(first)
    health = (0.75, 16.0, 7.0)
    meter.add(loss_with(5.0, [[2, 2, 0, 0], [1, 1, 1, 1]], 0, 1.0, 0.0, sent=7, health=health))
    metrics = meter.read(num_ranks=1, ep_size=2, bias_ranges=torch.tensor([0.5, 0.25]))
    # Layer 0 got 6, 2, 0, 0 (max / mean = 6 / 2), layer 1 got 2, 2, 2, 2 (1). The squares of (4, 0, -2, -2)
    # are 24, so the standard deviation is sqrt(6). Of two ranks one has experts 0 and 1: 8 of 8, mean 4.
    of_model = {
        "moe/load_imbalance": (3 + 1) / 2,
        "moe/max_vio": (2 + 0) / 2,
        "moe/load_cv": (math.sqrt(6) / 2 + 0) / 2,
        "moe/load_entropy": (entropy_of(0.75, 0.25) + 1) / 2,
        "moe/dead_experts": 2,
        "moe/router_entropy": 0.5,
        "moe/top1_margin": 0.5,
        "moe/logit_rms": math.sqrt(10),
        "moe/logit_max": 7.0,
        "moe/dropped_fraction": 2 / 16,
        "moe/rank_imbalance": (2 + 1) / 2,
        "moe/bias_range": 0.5,
    }
    of_layers = {
        "moe/layers/load_imbalance": [3, 1],
        "moe/layers/max_vio": [2, 0],
        "moe/layers/load_cv": [1.225, 0],
        "moe/layers/load_entropy": [0.4056, 1],
        "moe/layers/dead_experts": [2, 0],
        "moe/layers/router_entropy": [0.5, 0.5],
        "moe/layers/top1_margin": [0.5, 0.5],
        "moe/layers/logit_rms": [3.162, 3.162],
        "moe/layers/logit_max": [7, 7],
        "moe/layers/dropped_fraction": [0.125, 0.125],
        "moe/layers/rank_imbalance": [2, 1],
        "moe/layers/bias_range": [0.5, 0.25],
    }
    losses = {"loss/lm": 4.0, "loss/load_balancing": 1.5, "loss/router_z": 2.0}
    expected: dict[str, Any] = losses | {"comm/dispatch_bytes": 2 * 5 + 2 * 7} | of_model | of_layers
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_a_step_of_two_ranks_is_reported_as_if_one_rank_had_run_it_all():
    """The second rank's tensors are added to the first one's, as sums and maxima over ranks do."""
    first, second = StepMeter(torch.device("cpu")), StepMeter(torch.device("cpu"))
    first.add(loss_with(3.0, [[4, 0]], 1, 2.0, 1.0, sent=5, health=(0.5, 1.0, 9.0)))
    second.add(loss_with(5.0, [[1, 3]], 2, 4.0, 0.0, sent=7, health=(0.1, 3.0, 2.0)))
    there: list[torch.Tensor] = []
    second.reduce(SimpleNamespace(sum_over_ranks=there.append, max_over_ranks=there.append))  # type: ignore[arg-type]
    of_second = iter(there)
    ranks = SimpleNamespace(
        sum_over_ranks=lambda here: here.add_(next(of_second)),
        max_over_ranks=lambda here: here.copy_(torch.maximum(here, next(of_second))),
    )
    first.reduce(ranks)  # type: ignore[arg-type]
    metrics = first.read(num_ranks=2)
    for name, value in {
        "loss/lm": 4.0,
        "loss/load_balancing": 3.0,
        "loss/router_z": 2.0,
        "moe/load_imbalance": 5 / 4,
        "moe/dropped_fraction": 3 / 8,
        "moe/router_entropy": 0.5,
        "moe/dead_experts": 0,
        "moe/top1_margin": 0.3,
        "moe/logit_rms": math.sqrt(2),
        "moe/logit_max": 9.0,
        "comm/dispatch_bytes": 12,
    }.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_two_collapsed_layers_do_not_cancel():
    meter = StepMeter(torch.device("cpu"))
    meter.add(loss_with(1.0, [[8, 0], [0, 8]]))
    metrics = meter.read(1)
    assert (metrics["moe/load_imbalance"], metrics["moe/dead_experts"]) == (2.0, 2)


def test_a_dense_model_has_no_router_metrics():
    meter = StepMeter(torch.device("cpu"))
    meter.add(TrainingLoss(torch.tensor(3.0), torch.tensor(3.0), None))
    metrics = meter.read(1)
    assert metrics.pop("loss/lm") == 3.0
    assert len(metrics) == 15
    assert set(metrics.values()) == {None}


def train_and_keep_routes(arguments):
    """A run, and what the routers of its only step returned in training: by layer, all micro batches."""
    routes: dict[int, list[Any]] = {}
    route = MoELayer._route

    def keep(self: MoELayer, tokens_TD: torch.Tensor, context: TokenContext) -> RouterOutput:
        routing = route(self, tokens_TD, context)
        if self.training and self.router.weight.requires_grad and torch.is_grad_enabled():
            kept = routes.setdefault(id(self), [])
            kept.append([each.tolist() for each in routing[:4]])
        return routing

    MoELayer._route = keep
    try:
        assert train_once(arguments).code == 0
    finally:
        MoELayer._route = route
    return list(routes.values())


def recount(layer, ep_size):
    """The figures of one layer from the routes of its tokens, in plain Python."""
    experts = [expert for indices, *_ in layer for row in indices for expert in row]
    logits = [value for _, _, logits, _ in layer for row in logits for value in row]
    probs = [sorted(row, reverse=True) for _, _, _, probs in layer for row in probs]
    by_expert = Counter(experts)
    counts, mean = [by_expert[expert] for expert in range(4)], len(experts) / 4
    ranks = [sum(counts[rank * 4 // ep_size : (rank + 1) * 4 // ep_size]) for rank in range(ep_size)]
    return {
        "load_imbalance": max(counts) / mean,
        "max_vio": max(counts) / mean - 1,
        "load_cv": math.sqrt(sum((count - mean) ** 2 for count in counts) / 4) / mean,
        "load_entropy": entropy_of(*(count / len(experts) for count in counts if count)),
        "dead_experts": counts.count(0),
        "router_entropy": -sum(p * math.log(p) for row in probs for p in row) / len(probs),
        "top1_margin": sum(row[0] - row[1] for row in probs) / len(probs),
        "logit_rms": math.sqrt(sum(value**2 for value in logits) / len(logits)),
        "logit_max": max(map(abs, logits)),
        "rank_imbalance": max(ranks) / (len(experts) / ep_size),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "recomputes"), [(1, False), (1, True), (2, True)])
def test_every_figure_of_every_layer_is_that_of_a_recount_of_the_routes(
    small, short_samples, tmp_path, ranks, recomputes
):
    """Two micro batches on each rank; what runs again in the backward pass is not counted twice."""
    arguments = [
        *small, "train.steps=1", "optim.warmup_steps=1", "train.micro_batch_size=1",
        f"run.dir={tmp_path / 'run'}", f"parallel.ep_size={ranks}",
        f"train.activation_checkpointing={str(recomputes).lower()}",
    ]  # fmt: skip
    by_rank = run_ranks(ranks, train_and_keep_routes, arguments)
    [metrics] = [line for line in read_lines(tmp_path / "run") if "loss/lm" in line]
    for layer in range(2):
        of_layer = [routes for rank in by_rank for routes in rank[layer][:: 1 + recomputes]]
        assert len(of_layer) == 4
        for name, value in recount(of_layer, ranks).items():
            assert metrics[f"moe/layers/{name}"][layer] == pytest.approx(value, rel=1e-3), name
    assert metrics["moe/max_vio"] == pytest.approx(sum(metrics["moe/layers/max_vio"]) / 2, rel=1e-3)
