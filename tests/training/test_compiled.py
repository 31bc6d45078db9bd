"""torch.compile together with experts that are split over ranks."""

import os

import pytest
import torch
from torch._dynamo.utils import counters

from moe.dispatch.all_to_all import choose_dispatcher
from moe.model.transformer import Transformer
from moe.training.engine import Engine, start
from tests.support.engines import loss_of, make_config
from tests.support.ranks import run_ranks


def losses_and_norms(compiled: bool) -> tuple[list[float], int]:
    """Of four steps on two ranks, and how many graphs were compiled."""
    config = make_config(
        model={"d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 50},
        moe={"num_experts": 4, "top_k": 2, "d_ff_expert": 32, "num_shared_experts": 1},
        train={"global_batch_size": 8, "micro_batch_size": 2},
        parallel={"ep_size": 2},
    )
    world = start(config.parallel)
    model = Transformer(config, choose_dispatcher(world.groups, config.parallel, compiled))
    if compiled:
        del os.environ["TORCHDYNAMO_DISABLE"]  # see conftest.py
        for block in model.blocks:
            block.compile()
    engine, found = Engine(model, config, world), []
    generator = torch.Generator().manual_seed(world.rank)
    for _ in range(8):
        tokens = torch.randint(0, 50, (2, 17), generator=generator)
        loss = loss_of(engine(tokens[:, :-1]), tokens, config)
        engine.backward(loss)
        norms = engine.step(1e-2)
        found += [loss.item()] if norms is None else [loss.item(), norms.total]
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_blocks_with_split_experts_train_as_plain_ones():
    plain, compiled = (run_ranks(2, losses_and_norms, compiled) for compiled in (False, True))
    for (expected, none), (found, graphs) in zip(plain, compiled, strict=True):
        assert (none, graphs > 1) == (0, True)
        assert found == pytest.approx(expected, rel=1e-5)
