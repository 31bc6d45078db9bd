import json
import os
import socket
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

from moe.accounting.communication import estimate_wire, rows_per_token
from moe.accounting.gpus import known_gpu
from moe.accounting.memory import estimate_memory
from moe.accounting.placement import USABLE, placements
from moe.config import ConfigError, load_config, parse_config
from moe.dispatch.local import LocalDispatcher
from moe.model.grouped_mm import choose_expert_path
from moe.model.initialization import init_weights
from moe.model.transformer import Transformer
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
WEIGHTS = ["model.d_model=512", "model.n_heads=8", "moe.d_ff_expert=512", "train.global_batch_size=4"]
ACTIVATIONS = ["model.d_model=256", "moe.d_ff_expert=512", "train.global_batch_size=32"]
DENSE = ["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=1024"]
WIDE_LOGITS = [  # recomputation, and logits as large as a block
    "model.d_model=256", "moe.num_experts=4", "moe.top_k=4", "model.vocab_size=3072",
    "train.micro_batch_size=16", "train.activation_checkpointing=true",
]  # fmt: skip
MANY_EXPERTS = [  # recomputation, and gradients larger than what is kept
    "model.d_model=256", "moe.num_experts=16", "moe.d_ff_expert=256", "moe.top_k=8", "model.vocab_size=64",
    "train.micro_batch_size=8", "train.global_batch_size=16", "train.activation_checkpointing=true",
]  # fmt: skip
MEASURED = {
    1: [
        [*WEIGHTS, "train.micro_batch_size=4"],
        [*WEIGHTS, "train.micro_batch_size=2", "parallel.zero_stage=2", "moe.num_shared_experts=1"],
        [*ACTIVATIONS, "train.micro_batch_size=32"],
        [*ACTIVATIONS, "train.micro_batch_size=32", "train.activation_checkpointing=true"],
        [*ACTIVATIONS, "train.micro_batch_size=16", "model.qk_norm=true", "parallel.zero_stage=2"],
        [*ACTIVATIONS, "train.micro_batch_size=32", *DENSE],
        [*ACTIVATIONS, "train.micro_batch_size=32", "moe.capacity_factor=0.5"],
        [*WIDE_LOGITS, "train.global_batch_size=16"],
        [*WIDE_LOGITS, "train.global_batch_size=32"],
    ],
    2: [
        [*WEIGHTS, "train.micro_batch_size=2"],
        [*WEIGHTS, "train.micro_batch_size=2", "parallel.ep_size=2"],
        [*WEIGHTS, "train.micro_batch_size=1", "parallel.ep_size=2", "parallel.zero_stage=2"],
        [*ACTIVATIONS, "train.micro_batch_size=16", "parallel.ep_size=2", "moe.top_k=4"],
        [
            *ACTIVATIONS,
            "train.micro_batch_size=16",
            "parallel.ep_size=2",
            "train.activation_checkpointing=true",
        ],
        MANY_EXPERTS,
    ],
}


@pytest.mark.parametrize("world_size", MEASURED)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(world_size):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.memory_probe", json.dumps(MEASURED[world_size])],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    ratios = [estimate / peak for peak, estimate in json.loads(printed[0].splitlines()[-1])]
    assert len(ratios) == len(MEASURED[world_size])
    assert all(0.85 <= ratio <= 1.15 for ratio in ratios), ratios


def _reduced(calls):
    """Bytes that this rank sends in a ring for the all-reduces of one optimizer step, and the estimate."""
    import torch.distributed as dist

    from moe.training.engine import Engine, start
    from tests.memory_probe import CONFIG, train

    results, real_reduce, real_step = [], dist.all_reduce, Engine.step
    for overrides in calls:
        config = load_config(CONFIG, ["model.vocab_size=1024", "model.n_layers=2", *overrides])
        world, sent, after = start(config.parallel), [0.0], []

        def all_reduce(tensor, *args, sent=sent, group=None, **kwargs):
            ranks = dist.get_world_size(group)
            sent[0] += 2 * (ranks - 1) / ranks * tensor.numel() * tensor.element_size()
            return real_reduce(tensor, *args, group=group, **kwargs)

        def step(self, lr, sent=sent, after=after):
            norms = real_step(self, lr)
            after.append(sent[0])
            return norms

        dist.all_reduce, Engine.step = all_reduce, step
        try:
            train(config, world)
        finally:
            dist.all_reduce, Engine.step = real_reduce, real_step
        micro_steps = config.accumulation_steps(world.size)
        results.append((after[-1] - after[-1 - micro_steps], estimate_wire(config, world.size).gradients))
    return results


def test_gradient_bytes_are_those_that_deepspeed_reduces():
    calls = [
        ["parallel.ep_size=1", "train.micro_batch_size=2"],
        ["parallel.ep_size=2", "train.micro_batch_size=2"],
        ["parallel.ep_size=2", "train.micro_batch_size=2", "parallel.zero_stage=2"],
    ]
    for measured, estimate in run_ranks(2, _reduced, calls)[0]:
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
    assert estimate_wire(config, 2).all_to_all == int(rows * (4 * 64 * 4 + 2 * 16))
    again = config.train.model_copy(update={"activation_checkpointing": True})
    recomputed = estimate_wire(config.model_copy(update={"train": again}), 2).all_to_all
    assert recomputed == int(rows * (6 * 64 * 4 + 3 * 16))
    assert estimate_wire(config, 4).gradients > estimate_wire(config, 2).gradients > 0


def test_one_process_sends_nothing():
    config = parse_config({"model": {"vocab_size": 100}})
    assert estimate_wire(config, 1).total == 0


def test_states_are_split_as_zero_splits_them():
    config = parse_config(
        {
            "model": {"vocab_size": 100},
            "parallel": {"ep_size": 4, "zero_stage": 2, "precision": "bf16"},
            "train": {"micro_batch_size": 1},
        }
    )
    routed = 4 * 8 * 3 * 128 * 512  # layers, experts, matrices, widths
    others = 100 * 128 + 4 * (4 * 128 * 128 + 2 * 128 + 8 * 128) + 128
    memory = estimate_memory(config, 8, "cpu")
    assert memory.weights == 2 * (others + routed // 4)
    assert memory.optimizer == 12 * ((others + routed) // 8)
    assert memory.gradients == memory.update == 4 * ((others + routed) // 8)
    assert sum(memory.by_part().values()) > memory.peak > memory.weights + memory.optimizer


SHAPES = [
    ["moe.num_shared_experts=1", "model.n_kv_heads=2"],
    ["moe.first_dense_layers=2", "model.qk_norm=true"],
    ["moe.num_experts=1", "moe.top_k=1"],
    ["moe.top_k=6", "model.tie_embeddings=true"],
    ["model.d_ff=1024", "moe.every_n_layers=2", "model.head_dim=64"],
]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=[shape[0] for shape in SHAPES])
def test_activations_are_the_tensors_that_autograd_keeps(shape, precision):
    config = load_config(
        ROOT / "configs" / "tiny.yaml", ["model.vocab_size=512", *shape, f"parallel.precision={precision}"]
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = Transformer(config, LocalDispatcher(), choose_expert_path(torch.device("cpu"), dtype))
    init_weights(model, 0)
    model = model.to(dtype)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 512, (config.train.micro_batch_size, config.data.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens)
    assert output.logits.requires_grad
    assert estimate_memory(config, 1, "cpu").activations == pytest.approx(sum(kept.values()), rel=0.02)


OLMOE = load_config(
    ROOT / "configs" / "zoo" / "olmoe_1b_7b.yaml", ["train.global_batch_size=64", "train.micro_batch_size=1"]
)


def test_the_best_placement_fits_computes_nothing_twice_and_sends_least():
    gpu = known_gpu("h100")
    found = placements(OLMOE, 8, gpu.memory)
    assert len(found) == 4 * 2 * 2  # ep_size 1, 2, 4, 8; ZeRO 1 and 2; with and without recomputation
    fitting = [place for place in found if place.memory.peak <= USABLE * 80 * 2**30]
    assert found[: len(fitting)] == fitting
    best = found[0]
    assert not best.activation_checkpointing
    rivals = [place for place in fitting if not place.activation_checkpointing]
    assert best.wire.total == min(place.wire.total for place in rivals)
    assert [place.fits for place in found] == sorted((place.fits for place in found), reverse=True)


def test_where_nothing_fits_the_smallest_comes_first():
    found = placements(OLMOE, 2, 10**9)
    assert not any(place.fits for place in found)
    assert found[0].memory.peak == min(place.memory.peak for place in found)


def test_a_batch_that_does_not_split_over_the_gpus_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch_size"):
        placements(OLMOE, 3 * 64, 80 * 10**9)
