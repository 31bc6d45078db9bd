"""Expert parallelism of one layer, on real ranks, against the same layer in one process."""

import itertools
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moe.config import MoEConfig, ParallelConfig
from moe.dispatch import all_to_all
from moe.dispatch.all_to_all import AllToAllDispatcher, choose_dispatcher
from moe.dispatch.interface import RouterOutput
from moe.dispatch.local import LocalDispatcher
from moe.distributed import collectives
from moe.distributed.groups import ParallelGroups
from moe.model.grouped_swiglu import ExpertPath
from moe.model.moe_layer import MoELayer
from moe.training.engine import start
from tests.support.models import gradient_of, on_fake_cuda
from tests.support.ranks import run_ranks

D_MODEL = 16
TOLERANCE: dict[str, Any] = dict(rtol=1e-10, atol=1e-12)  # fp64 throughout


def make_layer(dispatcher, moe, path: ExpertPath = "loop", dtype=torch.float64):
    layer = MoELayer(D_MODEL, moe, dispatcher, path, seed=0).to(dtype)
    with torch.no_grad():
        layer.router.weight.mul_(30)  # decided routing, so that gate weights differ
    return layer


def inputs_of(rank, tokens=(2, 9)):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(*tokens, D_MODEL, dtype=torch.float64, generator=generator) for _ in range(2)]


def run_layer(layer, rank, tokens=(2, 9)):
    """Output, input gradient, parameter gradients and report for this rank's tokens."""
    hidden, upstream = inputs_of(rank, tokens)
    hidden.requires_grad_()
    out, aux = layer(hidden)
    ((out * upstream).sum() + aux.load_balancing_loss * len(hidden)).backward()
    gradients = {name: gradient_of(parameter) for name, parameter in layer.named_parameters()}
    return out.detach(), hidden.grad, gradients, aux


def compare_with_one_process(parallel, moe_settings):
    """On every rank: this rank's share of the work against all of it, done here without any exchange."""
    parallel, moe = ParallelConfig(**parallel), MoEConfig(**moe_settings)
    world = start(parallel)
    layer = make_layer(choose_dispatcher(world.groups, parallel), moe)
    out, hidden_grad, gradients, aux = run_layer(layer, world.rank)

    own: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for rank in range(world.size):
        alone = make_layer(LocalDispatcher(), moe)
        alone_out, alone_grad, alone_gradients, alone_aux = run_layer(alone, rank)
        if rank == world.rank:
            torch.testing.assert_close(out, alone_out, **TOLERANCE)
            torch.testing.assert_close(hidden_grad, alone_grad, **TOLERANCE)
            for name in ("load_balancing_loss", "router_z_loss", "tokens_per_expert", "dropped_tokens"):
                torch.testing.assert_close(getattr(aux, name), getattr(alone_aux, name), **TOLERANCE)
            own = alone_gradients
        if rank // parallel.ep_size == world.rank // parallel.ep_size:  # those who share the experts
            for name, gradient in alone_gradients.items():
                expected[name] = expected[name] + gradient if name in expected else gradient
    ids = layer.experts.expert_ids
    for name, gradient in gradients.items():
        wanted = expected[name][ids.start : ids.stop] if name.startswith("experts.") else own[name]
        torch.testing.assert_close(gradient, wanted, **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")
    return aux


CASES: dict[str, dict[str, Any]] = {
    "dropless": {"num_experts": 8, "top_k": 3},
    "capacity": {"num_experts": 8, "top_k": 2, "capacity_factor": 0.5},
    "shared": {"num_experts": 4, "top_k": 2, "num_shared_experts": 2, "shared_expert_gate": True},
    "top-1": {"num_experts": 4, "top_k": 1, "normalize_gate_weights": False},
    "all": {"num_experts": 4, "top_k": 4, "normalize_gate_weights": False, "capacity_factor": 0.9},
    "expert choice": {"num_experts": 4, "top_k": 2, "router": "expert_choice", "allow_causal_leak": True},
}


def every_case(ep_sizes):
    ways = itertools.product(ep_sizes, ("once_per_rank", "once_per_expert"), (True, False))
    for ep_size, how, overlap in ways:
        for case in CASES.values():
            parallel = {"ep_size": ep_size, "dispatch": how, "overlap": overlap, "device": "cpu"}
            compare_with_one_process(parallel, {"d_ff_expert": 24} | case)


@pytest.mark.parametrize(("world_size", "ep_sizes"), [(2, [2]), (4, [2, 4])])
def test_split_experts_equal_one_process_for_output_and_every_gradient(world_size, ep_sizes):
    """Dropless, with capacity, by experts' choice; both ways to send, with and without overlap; in fp64."""
    run_ranks(world_size, every_case, ep_sizes)


def uniform_routing(num_tokens, num_experts, top_k):
    """Each choice of K experts is as likely as any other."""
    indices = torch.rand(num_tokens, num_experts).topk(top_k, dim=1).indices
    probs = torch.full((num_tokens, num_experts), 1 / num_experts)
    return RouterOutput(indices, torch.rand(num_tokens, top_k), torch.zeros_like(probs), probs)


WAYS = ("local", "once_per_rank", "once_per_expert")


def counts_of_dispatchers(capacity):
    """By dispatcher: this rank's tokens per expert, how many it drops, and the rows of its two experts."""
    world = start(ParallelConfig(ep_size=2, device="cpu"))
    torch.manual_seed(world.rank)
    routing, hidden = uniform_routing(50, 4, 2), torch.randn(50, D_MODEL)
    found = {}
    for way in WAYS:
        dispatcher = (
            LocalDispatcher() if way == "local" else AllToAllDispatcher(world.groups, way == "once_per_rank")
        )
        in_flight = dispatcher.dispatch(hidden, routing, capacity)
        dispatcher.receive(in_flight)
        metadata = in_flight.metadata
        counts = (metadata.tokens_per_expert, metadata.dropped_tokens, metadata.permutation.rows_per_expert)
        found[way] = tuple(count.tolist() for count in counts)
    return found


def both_capacities():
    return {capacity: counts_of_dispatchers(capacity) for capacity in (None, 20)}


def test_counts_before_and_after_dropping_are_those_of_local_dispatch():
    """On each rank of its own tokens; the rows of an expert are those that all ranks sent to it."""
    by_rank = run_ranks(2, both_capacities)
    for capacity in (None, 20):
        ranks = [counts[capacity] for counts in by_rank]
        rows_of_experts = [sum(rows) for rows in zip(*(counts["local"][2] for counts in ranks), strict=True)]
        for rank, counts in enumerate(ranks):
            tokens, dropped, rows = counts["local"]
            assert sum(tokens) == 2 * 50
            assert (dropped > 0) == (capacity is not None)
            assert dropped == sum(tokens) - sum(rows)
            for way in WAYS[1:]:
                assert counts[way][:2] == (tokens, dropped), way
                assert counts[way][2] == rows_of_experts[2 * rank : 2 * rank + 2], way


UNIFORM = [(8, 2), (16, 4), (64, 8)]  # experts, of which a token goes to so many


def bytes_under_uniform_routing():
    """What this rank sends, once per rank and once per expert, of each of `UNIFORM`."""
    world = start(ParallelConfig(ep_size=4, device="cpu"))
    torch.manual_seed(world.rank)
    sent = []
    for (num_experts, top_k), once_per_rank in itertools.product(UNIFORM, (True, False)):
        dispatcher, hidden = AllToAllDispatcher(world.groups, once_per_rank), torch.zeros(8000, D_MODEL)
        in_flight = dispatcher.dispatch(hidden, uniform_routing(8000, num_experts, top_k))
        dispatcher.receive(in_flight)
        sent.append(int(in_flight.metadata.sent_bytes))
    return sent


def test_bytes_sent_per_token_are_those_of_the_expected_distinct_ranks():
    """Uniform routing: a rank holds none of a token's K experts with C(E - E/R, K) / C(E, K)."""
    per_token = iter(
        [sum(ranks) / (4 * 8000) for ranks in zip(*run_ranks(4, bytes_under_uniform_routing), strict=True)]
    )
    for num_experts, top_k in UNIFORM:
        elsewhere = math.comb(num_experts - num_experts // 4, top_k) / math.comb(num_experts, top_k)
        once_per_rank, once_per_expert = next(per_token), next(per_token)
        assert once_per_rank == pytest.approx(3 * (1 - elsewhere) * D_MODEL * 4, rel=0.02)
        assert once_per_expert == pytest.approx(top_k * 3 / 4 * D_MODEL * 4, rel=0.02)
        assert once_per_rank < once_per_expert


def uneven_work():
    """Rank 1 has no token at all; then every token of both ranks wants expert 0, for 20 steps."""
    parallel = ParallelConfig(ep_size=2, device="cpu")
    world = start(parallel)
    moe = MoEConfig(num_experts=4, top_k=1, normalize_gate_weights=False, d_ff_expert=24)
    paths: list[tuple[ExpertPath, torch.dtype]] = [("loop", torch.float64), ("grouped_mm", torch.float32)]
    for path, dtype in paths:
        layer = make_layer(choose_dispatcher(world.groups, parallel), moe, path, dtype)
        hidden = torch.randn(0 if world.rank else 2, 5, D_MODEL, dtype=dtype)
        out, _ = layer(hidden)
        assert out.shape == hidden.shape
        out.sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        with torch.no_grad():
            layer.router.weight.fill_(-1)
            layer.router.weight[0] = 1
        for _ in range(20):
            layer.zero_grad()
            out, aux = layer(torch.rand(2, 5, D_MODEL, dtype=dtype))
            assert aux.tokens_per_expert.tolist() == [10, 0, 0, 0]
            assert (
                int(aux.dispatch_bytes) == world.rank * 10 * D_MODEL * dtype.itemsize
            )  # expert 0 is rank 0's
            out.sum().backward()
            for weight in layer.experts.parameters():
                used = 1 if world.rank == 0 else 0
                assert (gradient_of(weight).flatten(1).abs().sum(1) > 0).tolist() == [bool(used), False]


def test_no_hang_and_zero_gradients_where_a_rank_or_an_expert_gets_nothing():
    run_ranks(2, uneven_work, timeout_s=60)


@pytest.mark.parametrize(("how", "rows"), [("once_per_rank", 6), ("once_per_expert", 12)])
def test_a_dispatch_waits_for_the_device_once(monkeypatch, how, rows):
    """On fake CUDA tensors a read by the host raises; the one place is replaced, and nothing else reads."""
    reads = []

    def counts_on_the_host(counts, group):
        reads.append(counts)
        return [[rows, 12], [rows, 12]], [[rows, 12], [rows, 12]]

    monkeypatch.setattr(all_to_all, "exchange_counts", counts_on_the_host)
    monkeypatch.setattr(collectives, "all_to_all_single", lambda *_, **__: SimpleNamespace(wait=lambda: None))
    no_group = cast(Any, None)
    dispatcher = AllToAllDispatcher(
        ParallelGroups(no_group, no_group, no_group, 2, 1), how == "once_per_rank"
    )
    moe = MoEConfig(num_experts=4, top_k=4, d_ff_expert=32, num_shared_experts=1)
    with FakeTensorMode(), torch.no_grad():
        layer = on_fake_cuda(lambda: MoELayer(D_MODEL, moe, dispatcher, "grouped_mm"), torch.bfloat16)
        out, aux = layer(torch.zeros(2, 3, D_MODEL, dtype=torch.bfloat16, device="cuda"))
    assert out.device.type == aux.dispatch_bytes.device.type == "cuda"
    assert len(reads) == 1


def reads_of_a_recomputed_layer():
    """How often counts were exchanged after the forward and the backward pass of two steps."""
    groups, reads = start(ParallelConfig(ep_size=2, device="cpu")).groups, []
    layer = make_layer(AllToAllDispatcher(groups), MoEConfig(num_experts=4, top_k=2, d_ff_expert=24))
    exchange = all_to_all.exchange_counts
    all_to_all.exchange_counts = lambda *arguments: reads.append(1) or exchange(*arguments)
    found = []
    for _ in range(2):
        hidden = torch.rand(2, 3, D_MODEL, dtype=torch.float64, requires_grad=True)
        out, _ = checkpoint(layer, hidden, use_reentrant=False, context_fn=layer.dispatcher.recomputation)
        found.append(len(reads))
        out.sum().backward()
        found.append(len(reads))
        layer(hidden)
    return found


def test_a_recomputed_layer_asks_for_no_counts_again():
    assert run_ranks(2, reads_of_a_recomputed_layer) == [[1, 1, 3, 3]] * 2


def test_a_token_that_stays_sends_no_bytes_and_a_local_layer_never_does():
    layer = make_layer(LocalDispatcher(), MoEConfig(num_experts=4, top_k=2, d_ff_expert=24))
    assert int(run_layer(layer, 0)[3].dispatch_bytes) == 0
