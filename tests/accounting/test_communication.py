"""Bytes that a rank sends in a step: against hand-worked steps, and those that DeepSpeed reduces."""

from itertools import combinations

import pytest
import torch.distributed as dist

from moe.accounting.communication import estimate_communication, rows_per_token
from moe.config import load_config, parse_config
from moe.training.engine import Engine, start
from tests.support.memory_probe import three_steps
from tests.support.paths import TINY
from tests.support.ranks import run_ranks


def reduced(calls):
    """Bytes that this rank sends in a ring for the all-reduces of one optimizer step, and the estimate."""
    results, real_reduce, real_step = [], dist.all_reduce, Engine.step
    for overrides in calls:
        config = load_config(TINY, ["model.vocab_size=1024", "model.n_layers=2", *overrides])
        world, sent, after = start(config.parallel), [0.0], []

        def all_reduce(tensor, *args, sent=sent, group=None, **kwargs):
            ranks = dist.get_world_size(group)
            sent[0] += 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size()
            return real_reduce(tensor, *args, group=group, **kwargs)

        def step(self, lr, sent=sent, after=after):
            norms = real_step(self, lr)
            after.append(sent[0])
            return norms

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", all_reduce)
            patch.setattr(Engine, "step", step)
            three_steps(config, world)
        micro_steps = config.accumulation_steps(world.size)
        results.append(
            (after[-1] - after[-1 - micro_steps], estimate_communication(config, world.size).gradients)
        )
    return results


def test_gradient_bytes_are_those_that_deepspeed_reduces():
    calls = [
        ["parallel.ep_size=1", "train.micro_batch_size=2"],
        ["parallel.ep_size=2", "train.micro_batch_size=2"],
        ["parallel.ep_size=2", "train.micro_batch_size=2", "parallel.zero_stage=2"],
    ]
    for measured, estimate in run_ranks(2, reduced, calls)[0]:
        assert measured == pytest.approx(estimate, rel=1e-3)  # flags and norms are a few bytes more


def test_rows_per_token_are_the_mean_over_all_choices_of_experts():
    for ranks, experts, top_k in ((2, 4, 2), (4, 8, 2), (4, 8, 3), (3, 9, 4)):
        config = parse_config(
            {"moe": {"num_experts": experts, "top_k": top_k}, "parallel": {"ep_size": ranks}}
        )
        chosen = list(combinations(range(experts), top_k))
        distinct = sum(len({expert // (experts // ranks) for expert in some}) for some in chosen)
        assert rows_per_token(config) == pytest.approx(distinct / len(chosen))
        once_per_expert = config.parallel.model_copy(update={"dispatch": "once_per_expert"})
        assert rows_per_token(config.model_copy(update={"parallel": once_per_expert})) == top_k


def test_all_to_all_bytes_of_a_hand_worked_step():
    config = parse_config(
        {
            "model": {"d_model": 64, "n_layers": 3, "vocab_size": 100},
            "moe": {"num_experts": 4, "top_k": 2, "first_dense_layers": 1},
            "data": {"seq_len": 10},
            "train": {"global_batch_size": 16, "micro_batch_size": 2},
            "parallel": {"ep_size": 2},
        }
    )
    # 4 micro batches of 20 tokens, 2 sparse layers. Of the 6 pairs of experts 2 lie on one rank: 10 / 6 ranks
    # a token, half of them the other one. A row of 64 fp32 travels there and back, forward and backward, and
    # two gate weights and two ids of 4 bytes forward and backward.
    rows = 4 * 20 * 2 * (10 / 6) / 2
    assert estimate_communication(config, 2).all_to_all == int(rows * (4 * 64 * 4 + 2 * 16))
    again = config.train.model_copy(update={"activation_checkpointing": True})
    recomputed = estimate_communication(config.model_copy(update={"train": again}), 2).all_to_all
    assert recomputed == int(rows * (6 * 64 * 4 + 3 * 16))
    assert estimate_communication(config, 4).gradients > estimate_communication(config, 2).gradients > 0


def test_one_process_sends_nothing():
    config = parse_config({"model": {"vocab_size": 100}})
    assert estimate_communication(config, 1).total == 0
