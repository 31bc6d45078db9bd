"""In bf16, routers stay in fp32, and gradients of micro batches and ranks are added up in it."""

import pytest
import torch

from moe.dispatch.all_to_all import choose_dispatcher
from moe.model.initialization import initial_weights
from moe.model.transformer import Transformer
from moe.training.engine import start
from tests.support.engines import batches, loss_of, make_config, make_engine, run_engine
from tests.support.models import moe_of
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
    micro_batches = torch.randint(0, 50, (MICRO_BATCHES, 2, 17), generator=generator)
    expected = {name: torch.zeros_like(weight).double() for name, weight in plain.named_parameters()}
    for tokens in micro_batches:
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
    for tokens in micro_batches:
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


def masters_of(engine):
    """Name -> fp32 master weight, of one rank; there need be no moments yet."""
    masters = {}
    for name, parameter in engine.module.named_parameters():
        [(flat, _, place)] = engine.training_state.parts_of(parameter)
        masters[name] = flat.detach()[place].view(parameter.shape).clone()
    return masters


def test_bf16_keeps_the_router_in_fp32_throughout():
    """Its weight is the fp32 master itself, before and after updates; all others are the rounded masters."""
    config = make_config(parallel={"precision": "bf16"})
    engine = make_engine(config, start(config.parallel))
    initial = {name: values for name, _, values in initial_weights(engine.module, config.run.seed)}
    seen = []
    moe_of(engine.module, 0).router.register_forward_hook(lambda _m, _i, out: seen.append(out))
    for steps in (0, 2):
        run_engine(engine, config, steps)
        masters = masters_of(engine)
        for name, weight in engine.module.named_parameters():
            is_router = ".router." in name
            assert weight.dtype == (torch.float32 if is_router else torch.bfloat16)
            assert torch.equal(weight, masters[name].to(weight.dtype)), name
            if steps == 0:
                assert torch.equal(masters[name], initial[name]), name
    router = masters["blocks.0.ffn.router.weight"]
    assert not torch.equal(router, router.bfloat16().float())
    assert not torch.equal(router, initial["blocks.0.ffn.router.weight"])
    assert {out.router_logits.dtype for out in seen} == {torch.float32}


def test_in_bf16_zero_2_adds_up_the_gradients_of_many_micro_batches_in_fp32():
    """Of 512 equal micro batches the mean is each one; in bf16 a sum stops growing at 256 equal numbers."""
    norms = []
    for count in (1, 512):
        config = make_config(
            train={"global_batch_size": 8 * count}, parallel={"precision": "bf16", "zero_stage": 2}
        )
        engine, tokens, found = make_engine(config, start(config.parallel)), batches(1)[0], None
        for _ in range(count):
            engine.backward(loss_of(engine(tokens[:, :-1]), tokens, config))
            found = engine.step(1e-3)
        assert found is not None
        norms.append(found.total)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
