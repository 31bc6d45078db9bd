"""The losses and router metrics of a step, against hand-worked ones."""

import torch

from moe.model.moe_layer import MoEAux
from moe.training.loss import TrainingLoss
from moe.training.step_metrics import StepMeter


def loss_with(lm, counts, dropped=0, balance=1.0, entropy=0.5, sent=0):
    """A micro batch: its cross-entropy, assignments by layer and expert, and the rest of each layer."""
    layers = len(counts)
    aux = MoEAux(
        torch.full((layers,), balance),
        torch.full((layers,), 2.0),
        torch.full((layers, len(counts[0])), torch.nan),
        torch.tensor(counts),
        torch.tensor([dropped] * layers),
        torch.full((layers,), entropy),
        torch.full((layers,), sent),
    )
    return TrainingLoss(torch.tensor(float("nan")), torch.tensor(lm), aux)  # no metric is of the total


def test_router_metrics_of_a_hand_worked_step():
    meter = StepMeter(torch.device("cpu"))
    meter.add(loss_with(3.0, [[4, 0, 0, 0], [1, 1, 1, 1]], dropped=1, balance=2.0, entropy=1.0, sent=5))
    meter.add(loss_with(5.0, [[2, 2, 0, 0], [1, 1, 1, 1]], dropped=0, balance=1.0, entropy=0.0, sent=7))
    metrics = meter.read(num_ranks=1)
    # Layer 0 got 6, 2, 0, 0 (max / mean = 6 / 2), layer 1 got 2, 2, 2, 2 (1).
    assert metrics == {
        "loss/lm": 4.0,
        "loss/load_balancing": 1.5,
        "loss/router_z": 2.0,
        "moe/load_imbalance": 2.0,
        "moe/dropped_fraction": 2 / 16,
        "moe/router_entropy": 0.5,
        "moe/dead_experts": 2,
        "comm/dispatch_bytes": 2 * 5 + 2 * 7,
    }


def test_a_step_of_two_ranks_is_reported_as_if_one_rank_had_run_it_all():
    first, second = StepMeter(torch.device("cpu")), StepMeter(torch.device("cpu"))
    first.add(loss_with(3.0, [[4, 0]], dropped=1, balance=2.0, entropy=1.0, sent=5))
    second.add(loss_with(5.0, [[1, 3]], dropped=2, balance=4.0, entropy=0.0, sent=7))
    for here, there in zip(first.tensors(), second.tensors(), strict=True):
        here += there  # as a sum over ranks does
    assert first.read(num_ranks=2) == {
        "loss/lm": 4.0,
        "loss/load_balancing": 3.0,
        "loss/router_z": 2.0,
        "moe/load_imbalance": 5 / 4,
        "moe/dropped_fraction": 3 / 8,
        "moe/router_entropy": 0.5,
        "moe/dead_experts": 0,
        "comm/dispatch_bytes": 12,
    }


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
    assert len(metrics) == 7
    assert set(metrics.values()) == {None}
