"""Updates that are skipped: which ones, and that they change nothing."""

import math

import pytest
import torch

from moe.training.engine import start
from moe.training.skipped_updates import UpdateGuard
from tests.support.engines import make_config, make_engine, run_engine
from tests.support.models import moe_of

CPU = torch.device("cpu")


def skipped(guard: UpdateGuard, norms: list[float]) -> list[float]:
    return [norm for norm in norms if guard.skips(torch.tensor(norm, dtype=torch.float64))]


def test_without_a_limit_only_norms_that_are_not_finite_are_skipped():
    guard = UpdateGuard(None, CPU)
    norms = [1.0] * 20 + [1e9, math.inf, -math.inf, 1e-9]
    assert skipped(guard, norms) == [math.inf, -math.inf]
    assert guard.skips(torch.tensor(math.nan))
    assert guard.recent_norms == []


def test_a_norm_far_above_the_median_is_skipped_and_does_not_count():
    """After 16 norms from 1 to 16 the median is 8, the lower of the middle two: above 80 is too much."""
    guard = UpdateGuard(10.0, CPU)
    assert skipped(guard, [float(norm) for norm in range(1, 16)]) == []
    assert skipped(guard, [1000.0]) == [], "15 norms are too few to tell"
    guard.load([float(norm) for norm in range(1, 17)])
    assert skipped(guard, [81.0, 80.5, 80.0, math.inf]) == [81.0, 80.5, math.inf]
    assert guard.recent_norms == [*range(1, 17), 80.0]
    assert skipped(guard, [1e9] * 200) == [1e9] * 200, "a spike never becomes the rule"


def test_the_window_is_the_last_128_norms_and_can_be_taken_up_again():
    guard, second = UpdateGuard(2.0, CPU), UpdateGuard(2.0, CPU)
    skipped(guard, [1.0] * 100 + [1.9] * 128)
    assert guard.recent_norms == pytest.approx([1.9] * 128)
    second.load(guard.recent_norms)
    assert skipped(second, [3.7, 3.9]) == [3.9]


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_update_leaves_weights_and_moments_as_they_are(zero_stage, precision, bad):
    config = make_config(parallel={"zero_stage": zero_stage, "precision": precision})
    engine = make_engine(config, start(config.parallel))

    def state() -> list[torch.Tensor]:
        found = [fragment.values.clone() for fragment in engine.training_state.fragments()]
        return found + [parameter.detach().clone() for parameter in engine.module.parameters()]

    run_engine(engine, config, 2)
    before = state()
    hook = moe_of(engine.module, 1).experts.w_down.register_hook(lambda gradient: gradient * bad)
    run_engine(engine, config, 1, first=2)
    hook.remove()
    assert all(torch.equal(*pair) for pair in zip(before, state(), strict=True))
    _, (norm,) = run_engine(engine, config, 1, first=2)
    assert math.isfinite(norm), "nothing of the bad gradient is left"
    assert not torch.equal(before[0], state()[0])
