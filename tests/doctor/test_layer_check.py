"""The doctor's own check of the layer: small for ours, large for a wrong one."""

import pytest
import torch

from moe.config import parse_config
from moe.doctor.layer_check import layer_error
from moe.model import router

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"num_shared_experts": 1, "route_scale": 2.0},
        {"num_shared_experts": 2, "shared_expert_gate": True},
        {"top_k": 3, "normalize_gate_weights": False},
        {"router": "sigmoid"},
        {"router": "noisy_topk"},
        {"router": "hash"},
        {"router": "expert_choice", "allow_causal_leak": True},
    ],
    ids=str,
)
def test_our_layer_passes(moe):
    config = parse_config({"model": {"d_model": 32}, "moe": {"num_experts": 4, "d_ff_expert": 32} | moe})
    assert layer_error(config, CPU) < 1e-5


def test_a_gate_weight_that_is_off_by_a_thousandth_is_found(monkeypatch):
    real = router.Router.forward

    def wrong(self, hidden, context):
        routing = real(self, hidden, context)
        return routing._replace(gate_weights=routing.gate_weights * 1.001)

    monkeypatch.setattr(router.Router, "forward", wrong)
    config = parse_config({"model": {"d_model": 32}, "moe": {"num_experts": 4, "d_ff_expert": 32}})
    assert layer_error(config, CPU) > 5e-4
