"""Whole runs of train.py on several topologies: one and the same run."""

import itertools
import json

import pytest
import torch

from moe.training.engine import start
from tests.support.engines import batches, loss_of, make_config, make_engine
from tests.support.ranks import run_ranks
from tests.support.runs import final_state, read_lines
from tests.support.training import train_each

pytestmark = pytest.mark.xdist_group("parity")  # its runs are made once

STEPS = 30
REFERENCE = (1, 1, 1, 4)  # ranks, ep_size, ZeRO stage, micro batch
OTHERS = [(2, 1, 1, 4), (2, 2, 2, 2), (4, 1, 2, 4), (4, 2, 1, 1), (4, 4, 2, 4)]
# What rounding explains: loss and norm relative, final weights absolute.
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-4


def overrides_of(topology, folder):
    ranks, ep_size, zero_stage, micro = topology
    return [
        f"parallel.ep_size={ep_size}", f"parallel.zero_stage={zero_stage}", f"train.micro_batch_size={micro}",
        f"run.dir={folder / f'{ranks}-{ep_size}-{zero_stage}-{micro}'}",
    ]  # fmt: skip


def train_topologies(topologies, overrides, folder):
    for ranks, group in itertools.groupby(sorted(topologies), key=lambda topology: topology[0]):
        calls = [[*overrides, *overrides_of(topology, folder)] for topology in group]
        for trained in run_ranks(ranks, train_each, calls):
            assert [one.code for one in trained] == [0] * len(calls), trained


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("topologies")
    overrides = [
        *small, f"train.steps={STEPS}", "train.global_batch_size=16", "train.eval_interval=15",
        f"train.checkpoint_interval={STEPS}", "optim.warmup_steps=10", "optim.grad_clip=0.3",
        "cost.peak_flops=1e12",
    ]  # fmt: skip
    train_topologies([REFERENCE, *OTHERS], overrides, folder)
    return folder


def lines_of(folder, topology):
    return read_lines(folder / "-".join(map(str, topology)))


@pytest.mark.slow
@pytest.mark.parametrize("topology", OTHERS, ids=str)
def test_every_loss_norm_evaluation_and_weight_is_that_of_one_rank(runs, topology):
    lines, reference = lines_of(runs, topology), lines_of(runs, REFERENCE)
    assert min(line["optim/grad_norm"] for line in reference if "loss/lm" in line) > 0.3, "clipping must bite"
    for line, wanted in zip(lines, reference, strict=True):
        for key in {"loss/lm", "loss/load_balancing", "loss/router_z", "eval/loss"} & wanted.keys():
            assert line[key] == pytest.approx(wanted[key], rel=LOSS), (line["step"], key)
        for key in [key for key in wanted if key.startswith("optim/grad_norm")]:
            assert line[key] == pytest.approx(wanted[key], rel=NORM), (line["step"], key)
    state, expected = (final_state(runs / "-".join(map(str, each))) for each in (topology, REFERENCE))
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.startswith("weights"):
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=WEIGHTS, msg=name)


@pytest.mark.slow
def test_bytes_are_counted_where_experts_are_split_and_nowhere_else(runs):
    for topology in (REFERENCE, *OTHERS):
        sent = {line["comm/dispatch_bytes"] > 0 for line in lines_of(runs, topology) if "loss/lm" in line}
        assert sent == {topology[1] > 1}, topology


@pytest.mark.slow
def test_the_utilisation_is_that_of_all_ranks_together(runs):
    for topology in (REFERENCE, *OTHERS):
        run = runs / "-".join(map(str, topology))
        flops = json.loads((run / "summary.json").read_text())["flops_per_token"]
        line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])
        per_rank = line["perf/tokens_per_s"] * flops / topology[0]
        assert line["perf/mfu"] == pytest.approx(per_rank / 1e12), topology


def build(parallel, **sections):
    """A configuration at ep 2, and its engine with split experts."""
    config = make_config(
        train={"micro_batch_size": 2, "steps": 20} | sections.pop("train", {}),
        parallel={"ep_size": 2, **parallel},
        **sections,
    )
    return config, make_engine(config, start(config.parallel))


def train_engine(config, engine, steps):
    """Loss, norms and bytes of each step."""
    record = []
    for tokens in batches(steps):
        mine = tokens[2 * engine.world.rank : 2 * engine.world.rank + 2]
        output = engine(mine[:, :-1])
        loss = loss_of(output, mine, config)
        engine.backward(loss)
        record.append((loss.item(), engine.step(1e-2), int(output.aux.dispatch_bytes.sum())))
    return record


CHANGES = {
    "recomputed": ({}, {"activation_checkpointing": True}),
    "one after the other": ({"overlap": False}, {}),
    "per expert": ({"dispatch": "once_per_expert"}, {}),
    "all": ({"overlap": False, "dispatch": "once_per_expert"}, {"activation_checkpointing": True}),
}


TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


def records():
    """By precision and change: loss, norms and bytes of four steps."""
    moe = {"top_k": 3, "num_shared_experts": 1}
    runs = {}
    for precision in TOLERANCE:
        runs[precision, "plain"] = train_engine(*build({"precision": precision}, moe=moe), 4)
        for name, (parallel, train) in CHANGES.items():
            changed = build({"precision": precision, **parallel}, train=train, moe=moe)
            runs[precision, name] = train_engine(*changed, 4)
    return runs


@pytest.mark.slow
def test_recomputation_overlap_and_the_way_to_send_change_no_step():
    """On four ranks at ep 2. Sent per expert, the sums of a token's outputs are rounded in another order."""
    for runs in run_ranks(4, records):
        for precision, tolerance in TOLERANCE.items():
            plain = runs[precision, "plain"]
            assert runs[precision, "recomputed"] == plain
            assert runs[precision, "one after the other"] == plain
            for name in ("per expert", "all"):
                for (loss, norms, sent), (wanted, wanted_norms, fewer) in zip(
                    runs[precision, name], plain, strict=True
                ):
                    assert loss == pytest.approx(wanted, rel=tolerance), name
                    assert norms.total == pytest.approx(wanted_norms.total, rel=10 * tolerance), name
                    assert sent > fewer, name


# ZeRO stage, precision, gradient clipping
REPLICATED = [(1, "fp32", 0.5), (2, "fp32", 0.0), (1, "bf16", 0.5), (2, "bf16", 0.0)]


def assert_norms_are_those_of_the_first_moments(engine, norms, grad_clip, case):
    """After one step Adam's first moment is 0.1 of the clipped gradient; each element is on one rank."""
    families = ["dense", "router", "experts"]
    squares = torch.zeros(3, dtype=torch.float64)
    for kind, name, _, _, values in engine.training_state.fragments():
        if kind == "exp_avg":
            module = name.split(".")[-2]
            family = families.index(module) if module in families else 0
            squares[family] += values.double().square().sum()
    torch.distributed.all_reduce(squares)
    shortened = min(1.0, grad_clip / norms.total) if grad_clip else 1.0
    assert shortened < 1 or not grad_clip, "the clipping must bite"
    expected = (squares.sqrt() / 0.1 / shortened).tolist()
    assert list(norms.families().values()) == pytest.approx(expected, rel=1e-4), case
    assert norms.total == pytest.approx(squares.sum().sqrt().item() / 0.1 / shortened, rel=1e-4), case


def replicas_after_20_steps():
    for case in REPLICATED:
        zero_stage, precision, grad_clip = case
        parallel = {"zero_stage": zero_stage, "precision": precision}
        config, engine = build(parallel, optim={"grad_clip": grad_clip})
        [(_, norms, _)] = train_engine(config, engine, 1)
        assert_norms_are_those_of_the_first_moments(engine, norms, grad_clip, case)
        train_engine(config, engine, 20)
        groups = engine.world.groups
        for name, parameter in engine.module.named_parameters():
            group = groups.edp_group if ".experts." in name else groups.dp_group
            copies = [torch.empty_like(parameter) for _ in range(group.size())]
            torch.distributed.all_gather(copies, parameter.detach(), group=group)
            assert len(copies) == (2 if ".experts." in name else 4)
            assert all(torch.equal(copy, parameter) for copy in copies), (case, name)


@pytest.mark.slow
def test_norms_are_right_and_replicas_bit_equal_after_20_steps():
    """On four ranks at ep 2: those of an expert on two ranks, all others on four."""
    run_ranks(4, replicas_after_20_steps)
