"""A dry run shows what each rank of any number holds and sends, and refuses what cannot be run."""

import re
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from moe.accounting.communication import all_to_all_calls
from moe.accounting.gpus import named_gpu
from moe.config import ConfigError, changed, load_config, parse_config
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed import collectives
from moe.doctor.dry_run import DryRun, dry_run, refuse_impossible
from moe.model.transformer import Transformer
from moe.training.engine import start
from moe.training.loss import training_loss
from scripts.doctor import main
from tests.support.paths import CONFIGS, TINY
from tests.support.ranks import run_ranks

BASE = CONFIGS / "base_8gpu.yaml"
SHIPPED = [BASE, *sorted((CONFIGS / "zoo").glob("*.yaml"))]
WORLDS = (8, 64, 1024)
SMALL = {
    "model": {
        "d_model": 8,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "d_ff": 16,
        "vocab_size": 10,
        "tie_embeddings": False,
        "qk_norm": False,
    },
    "moe": {"num_experts": 4, "top_k": 2, "d_ff_expert": 6, "first_dense_layers": 1},
    "data": {"seq_len": 16},
    "train": {"global_batch_size": 8, "micro_batch_size": 1},
    "parallel": {"ep_size": 2, "device": "cpu"},
}


def batch_for(path: Path, world_size: int) -> list[str]:
    """The batch of `base_8gpu` is too small for 1,024 ranks; this is the fix that the refusal names."""
    return ["train.global_batch_size=4096"] if (path, world_size) == (BASE, 1024) else []


def dry_runs_of_everything() -> tuple[DryRun, dict[tuple[Path, int], tuple[DryRun, float]], str, int]:
    """In a process of its own: a small run, all shipped ones with their seconds, and the command's output."""
    small, shipped = dry_run(parse_config(SMALL), 4), {}
    for path in SHIPPED:
        for world_size in WORLDS:
            began, config = time.perf_counter(), load_config(path, batch_for(path, world_size))
            shipped[path, world_size] = dry_run(config, world_size), time.perf_counter() - began
    with redirect_stdout(StringIO()) as printed:
        assert main([str(BASE), "--world", "64", "--gpu", "h100"]) == 0
    with redirect_stdout(printed):
        assert main([str(CONFIGS / "tiny_dense.yaml"), "train.micro_batch_size=4", "--world", "2"]) == 0
    return small, shipped, printed.getvalue(), start(parse_config({}).parallel).size


@pytest.fixture(scope="module")
def everything():
    [found] = run_ranks(1, dry_runs_of_everything)
    return found


def test_each_of_4_ranks_holds_what_is_worked_out_by_hand(everything):
    small, *_ = everything
    attention = 2 * (2 * 8 * 8 + 2 * 8 * 4)  # two layers: query and output; key and value of one head of 4
    norms = 2 * 2 * 8 + 8
    dense = 2 * 10 * 8 + attention + norms + 3 * 8 * 16  # embedding and head; the block of the first layer
    parameters = {"dense": dense, "router": 8 * 4, "experts": 2 * 3 * 8 * 6}
    assert dense == 968
    assert [rank.parameters for rank in small.ranks] == [parameters] * 3
    assert [(rank.rank, rank.experts) for rank in small.ranks] == [
        (0, (range(0, 2),)),
        (1, (range(2, 4),)),
        (3, (range(2, 4),)),
    ]
    assert [rank.groups for rank in small.ranks] == [
        {"dp": [0, 1, 2, 3], "ep": [0, 1], "edp": [0, 2]},
        {"dp": [0, 1, 2, 3], "ep": [0, 1], "edp": [1, 3]},
        {"dp": [0, 1, 2, 3], "ep": [2, 3], "edp": [1, 3]},
    ]
    text = "\n".join(small.lines(None))
    assert re.search(r"^0, 2 +0, 1 +1,288 +288 +32 +968$", text, re.MULTILINE), text
    assert re.search(r"^1, 3 +2, 3 +1,288 +288 +32 +968$", text, re.MULTILINE), text
    assert re.search(r"^all ranks together +5,152 +1,152$", text, re.MULTILINE), text
    assert "each expert of a layer is on 2 of 4 ranks" in text


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_can_be_looked_at_on_any_number_of_ranks(everything, path, world_size):
    found, seconds = everything[1][path, world_size]
    assert [check.passed for check in found.checks()] == [True, True]
    assert found.settings["train_batch_size"] == found.config.train.global_batch_size
    assert found.ranks[-1].rank == world_size - 1
    assert found.ranks[-1].groups["dp"] == list(range(world_size))
    assert seconds < 5
    assert "\npeak " in "\n".join(found.lines(None))


def test_a_rank_that_holds_too_little_or_another_ranks_experts_is_found(everything):
    small, *_ = everything
    rank, other, last = small.ranks
    fewer = rank._replace(parameters=rank.parameters | {"experts": 144})
    for broken, passed in (
        ((fewer, other, last), [False, True]),
        ((rank, other._replace(experts=rank.experts), last), [True, False]),
        ((rank, other, last._replace(experts=rank.experts)), [True, False]),
        ((rank, other._replace(experts=()), last), [True, False]),
        ((rank, other._replace(others=frozenset()), last), [True, False]),
    ):
        found = DryRun(small.config, 4, broken, small.settings)
        assert [check.passed for check in found.checks()] == passed
        assert sum(line.startswith("FAIL") for line in found.lines(None)) == 1


def test_the_command_prints_every_part(everything):
    *_, printed, _ = everything
    for line in (
        r"base_8gpu on 64 ranks, parallel.ep_size=4",
        r"ep: split the experts +16 +4 +0, 1, 2, 3 +60, 61, 62, 63",
        r"edp: hold the same experts +4 +16 +0, 4, ..., 60 +3, 7, ..., 63",
        r"3, 7, ..., 63 +48, 49, ..., 63 +2,087,323,648 +1,610,612,736 +2,097,152 +474,613,760",
        r"pass  the parameters of each rank, counted in its model, are equal to .*",
        r"pass  each expert of a layer is on 16 of 64 ranks, every other parameter on all",
        r"pass  every parameter is on all ranks",
        r"all-to-all +11,878,491,780 +11.06",
        r"112 calls of all-to-all, each among 4 ranks",
        r"peak +42.10",
        r"fits 72.00 GiB, 90% of the memory of H100",
        r' "gradient_accumulation_steps": 1,',
    ):
        assert re.search(f"^{line}$", printed, re.MULTILINE), (line, printed)


def test_a_run_can_start_in_the_same_process_afterwards(everything):
    assert everything[-1] == 1


def calls_of_a_step(recomputes: bool) -> int:
    """How often one of two ranks really calls all-to-all in a micro batch."""
    train = {"global_batch_size": 2, "micro_batch_size": 1, "activation_checkpointing": recomputes}
    config = parse_config(SMALL | {"train": train})
    model = Transformer(config, choose_dispatcher(start(config.parallel).groups, config.parallel))
    calls, real = [], collectives.all_to_all_single
    collectives.all_to_all_single = lambda *args, **options: calls.append(1) or real(*args, **options)
    tokens = torch.arange(16).view(1, 16) % 10
    training_loss(model(tokens), tokens, config.moe).total.backward()
    assert all_to_all_calls(config, 2) == len(calls)
    return len(calls)


@pytest.mark.parametrize(("recomputes", "calls"), [(False, 7), (True, 10)])
def test_calls_of_all_to_all_are_those_of_a_real_step(recomputes, calls):
    assert run_ranks(2, calls_of_a_step, recomputes) == [calls] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [BASE, "--world", "10"],
            "parallel.ep_size: 4 does not divide the 10 ranks; use a divisor, or start 12 ranks",
        ),
        (
            [BASE, "--world", "1024"],
            "train.global_batch_size: 256 is not a multiple of train.micro_batch_size (4) x 1024 ranks; "
            "use 4096",
        ),
        (
            [TINY, "moe.num_experts=6", "parallel.ep_size=4", "--world", "4"],
            "parallel.ep_size: 4 does not divide moe.num_experts (6); use a divisor",
        ),
        (
            [BASE, "parallel.ep_size=1", "--world", "8", "--gpu", "l4"],
            "--world: a rank takes 97.77 GiB of the usable 21.60 GiB of L4, and 22.44 GiB is the least with "
            "any ep_size, ZeRO stage and recomputation; use --world 16",
        ),
        (
            [CONFIGS / "zoo" / "deepseek_moe_16b.yaml", "--world", "8", "--gpu", "h100"],
            "parallel.ep_size: a rank takes 158.90 GiB of the usable 72.00 GiB of H100; use "
            "parallel.ep_size=8, which takes 61.59 GiB",
        ),
        (
            [CONFIGS / "zoo" / "mixtral_8x22b.yaml", "--world", "8", "--gpu", "h100"],
            "--world: a rank takes 1,314.42 GiB of the usable 72.00 GiB of H100, and 368.97 GiB is the least "
            "with any ep_size, ZeRO stage and recomputation; use --world 128\n",
        ),
        (
            [BASE, "train.global_batch_size=32", "model.n_layers=32", "--world", "8", "--gpu", "l4"],
            "--world: a rank takes 96.59 GiB of the usable 21.60 GiB of L4, and 36.23 GiB is the least with "
            "any ep_size, ZeRO stage and recomputation; use a GPU with more memory\n",
        ),
        ([TINY, "model.vocab_size=null", "data.tokenizer=absent.json", "--world", "4"], "model.vocab_size: "),
        ([TINY, "parallel.device=cpu", "--world", "1", "--gpu", "h100"], "parallel.device: is cpu; "),
        ([TINY, "--world", "4", "--gpu", "abacus"], "--gpu: 'abacus' is not known; use one of "),
        ([TINY, "--gpu", "h100"], "--gpu: is for a dry run; give the number of ranks too"),
        ([TINY, "--world", "4", "--steps", "5"], "--world: trains nothing; remove --steps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_printed(capsys, arguments, message):
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_the_placement_that_a_refusal_proposes_is_accepted():
    gpu, config = named_gpu("--gpu", "h100"), load_config(CONFIGS / "zoo" / "deepseek_moe_16b.yaml")
    with pytest.raises(ConfigError) as refusal:
        refuse_impossible(config, 8, gpu)
    [proposed] = re.findall(r"use (\S+)=(\d+),", refusal.value.message)
    refuse_impossible(changed(config, {proposed[0]: int(proposed[1])}), 8, gpu)
