"""In bf16, gradients of micro batches and ranks are added up as in fp32."""

import pytest
import torch

from moe.dispatch.all_to_all import choose_dispatcher
from moe.model.transformer import Transformer
from moe.training.engine import start
from tests.support.engines import loss_of, make_config, make_engine
from tests.support.ranks import run_ranks

MICRO_BATCHES, RANKS = 16, 4


def error_of_the_gradient(ep_size: int, zero_stage: int) -> tuple[float, float]:
    """Squared error of this rank's share of the engine's gradient, and the squared norm of that share.

    The reference is the sum, in fp64, of the same bf16 gradients, taken by plain autograd.
    """
    parallel = {"precision": "bf16", "ep_size": ep_size, "zero_stage": zero_stage}
    train = {"global_batch_size": 2 * MICRO_BATCHES * RANKS, "micro_batch_size": 2}
    config = make_config(train=train, parallel=parallel)
    world = start(config.parallel)
    engine = make_engine(config, world)
    plain = Transformer(config, choose_dispatcher(world.groups, config.parallel), "grouped_mm")
    plain.to(torch.bfloat16).load_state_dict(engine.module.state_dict())

    generator = torch.Generator().manual_seed(world.rank)
    batches = torch.randint(0, 50, (MICRO_BATCHES, 2, 17), generator=generator)
    expected = {name: torch.zeros_like(weight).double() for name, weight in plain.named_parameters()}
    for tokens in batches:
        plain.zero_grad()
        (loss_of(plain(tokens[:, :-1]), tokens, config) / MICRO_BATCHES).backward()
        for name, weight in plain.named_parameters():
            assert weight.grad is not None
            expected[name] += weight.grad.double()
    for name, total in expected.items():
        group = world.groups.edp_group if ".experts." in name else world.groups.dp_group
        torch.distributed.all_reduce(total, group=group)
        total /= RANKS

    names = {weight: name for name, weight in engine.module.named_parameters()}
    found: dict[str, tuple[slice, torch.Tensor]] = {}
    squares = engine._squares_by_family

    def look_at_gradients() -> torch.Tensor:
        for weight, gradient in engine.training_state.gradients():
            [(_, inside, _)] = engine.training_state.parts_of(weight)
            found[names[weight]] = inside, gradient.flatten().double()
        return squares()

    engine._squares_by_family = look_at_gradients
    for tokens in batches:
        engine.backward(loss_of(engine(tokens[:, :-1]), tokens, config))
        engine.step(1e-3)
    error = total = 0.0
    for name, (inside, gradient) in found.items():
        wanted = expected[name].flatten()[inside]
        error += (gradient - wanted).square().sum().item()
        total += wanted.square().sum().item()
    return error, total


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_sixteen_micro_batches_on_four_ranks_add_up_as_in_fp32(ep_size, zero_stage):
    results = run_ranks(RANKS, error_of_the_gradient, ep_size, zero_stage)
    error, total = (sum(part) for part in zip(*results, strict=True))
    assert total > 0
    assert (error / total) ** 0.5 < 1e-6  # 2e-3 if the ranks reduce in bf16
