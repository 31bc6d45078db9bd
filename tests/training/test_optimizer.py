"""Which parameters are decayed, and the learning rate of every step."""

import itertools
import math

import pytest

from moe.config import Config, parse_config
from moe.model.transformer import Transformer
from moe.training.optimizer import learning_rate, parameter_groups


def test_every_parameter_is_in_exactly_one_group_and_norms_are_never_decayed():
    config = parse_config({"model": {"qk_norm": True, "vocab_size": 50}, "moe": {"num_shared_experts": 1}})
    model = Transformer(config)
    groups = parameter_groups(model, 0.1)
    assert [group["name"] for group in groups] == ["decayed, torch.float32", "not_decayed, torch.float32"]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name


def schedule(steps: int, **optim: float) -> Config:
    return parse_config({"train": {"steps": steps}, "optim": optim})


def test_schedule_of_hand_worked_points():
    config = schedule(15, lr=1.0, min_lr_ratio=0.1, warmup_steps=4)
    rates = [learning_rate(config, step) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.5)  # half way from step 4 to step 14
    assert rates[14] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))


def test_schedule_without_warm_up_and_of_one_step():
    assert learning_rate(schedule(1, lr=2.0, warmup_steps=0), 0) == 2.0
    assert math.isfinite(learning_rate(schedule(1, lr=2.0, warmup_steps=1), 0))
