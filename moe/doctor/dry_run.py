"""A run of any number of ranks without its GPUs: groups, parameters, bytes sent, memory, settings.

One process is one rank after the other. The groups are those of a run, but of torch's fake backend, which
sends nothing; the model is the one that trains, on the meta device, which allocates nothing.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from moe.accounting.communication import all_to_all_calls, estimate_communication
from moe.accounting.counts import ModelCounts, count_parameters
from moe.accounting.gpus import GPU
from moe.accounting.memory import estimate_memory
from moe.accounting.placement import USABLE, Placement, placements
from moe.config import Config, ConfigError
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed.topology import Topology
from moe.model.experts import GroupedExperts
from moe.model.parameter_roles import family, parameter_roles
from moe.model.transformer import Transformer
from moe.tables import align, gib
from moe.training.deepspeed_config import deepspeed_config
from moe.training.engine import check_settings, rank_alone

_SHOWN = 8  # ranks with different experts in the table
_GROUPS = {"dp": "all ranks", "ep": "split the experts", "edp": "hold the same experts"}


class Rank(NamedTuple):
    """What one rank holds, counted in its model and its process groups."""

    rank: int
    groups: dict[str, list[int]]  # the ranks of its `dp`, `ep` and `edp` group
    parameters: dict[str, int]  # by family, `dense`, `router` or `experts`
    experts: tuple[range, ...]  # ids of the routed experts, MoE layer by MoE layer
    others: frozenset[tuple[str, torch.Size]]  # names and shapes of all parameters but the routed experts'

    @property
    def total(self) -> int:
        """All its parameters."""
        return sum(self.parameters.values())


class Check(NamedTuple):
    """One statement about the run, and whether it is true."""

    statement: str
    passed: bool


@dataclass(frozen=True)
class DryRun:
    """What a run on `world_size` ranks would be.

    Attributes:
        ranks: those of the first `ep_group`, which all hold different experts, then the last rank of all.
        settings: DeepSpeed's JSON configuration, which DeepSpeed has read on each of these ranks.
    """

    config: Config
    world_size: int
    ranks: Sequence[Rank]
    settings: dict[str, Any]

    def checks(self) -> list[Check]:
        """Whether each rank holds what the formulas say, and all together each parameter often enough."""
        ep_size, moe = self.config.parallel.ep_size, self.config.moe
        *first, last = self.ranks
        expected = parameters_of_a_rank(count_parameters(self.config), ep_size)
        copies = Counter[tuple[int, int]]()  # of each layer's experts, among all ranks
        for rank in first:
            for layer, ids in enumerate(rank.experts):
                copies.update({(layer, i): len(rank.groups["edp"]) for i in ids})
        layers = 0 if moe.is_dense else len(self.config.moe_layers)
        held = {
            (layer, i): self.world_size // ep_size for layer in range(layers) for i in range(moe.num_experts)
        }
        same = next(rank for rank in first if rank.rank in last.groups["edp"])
        alike = same.experts == last.experts and len({rank.others for rank in self.ranks}) == 1
        each = f"each expert of a layer is on {self.world_size // ep_size} of {self.world_size} ranks"
        statement = f"{each}, every other parameter on all" if layers else "every parameter is on all ranks"
        return [
            Check(
                "the parameters of each rank, counted in its model, are equal to the count of count.py",
                all(rank.parameters == expected for rank in self.ranks),
            ),
            Check(statement, copies == held and alike),
        ]

    def lines(self, gpu: GPU | None) -> Iterator[str]:
        """The report, line by line."""
        ep_size = self.config.parallel.ep_size
        yield f"{self.config.run.name} on {self.world_size} ranks, parallel.ep_size={ep_size}\n"
        yield align(list(self._group_rows())) + "\n"
        yield align(list(self._parameter_rows()))
        for check in self.checks():
            yield f"{'pass' if check.passed else 'FAIL'}  {check.statement}"
        yield "\n" + align(list(self._sent_rows()))
        calls = all_to_all_calls(self.config, self.world_size)
        yield f"{calls:,} calls of all-to-all, each among {ep_size} ranks\n" if calls else ""
        memory = estimate_memory(self.config, self.world_size, device_type(self.config))
        sizes = memory.by_part() | {"peak": memory.peak}
        rows = [[part, f"{size / 2**30:,.2f}"] for part, size in sizes.items()]
        yield align([["memory of a rank", "GiB"], *rows])
        if gpu is not None:
            yield f"fits {gib(USABLE * gpu.memory)}, {USABLE:.0%} of the memory of {gpu.name}"
        yield "\nDeepSpeed's configuration\n" + json.dumps(self.settings, indent=1)

    def _group_rows(self) -> Iterator[list[str]]:
        first, last = self.ranks[0], self.ranks[-1]
        yield ["group", "groups", "ranks each", "of rank 0", f"of rank {last.rank}"]
        for name, purpose in _GROUPS.items():
            size = len(first.groups[name])
            members = [shortened(rank.groups[name]) for rank in (first, last)]
            yield [f"{name}: {purpose}", str(self.world_size // size), str(size), *members]

    def _parameter_rows(self) -> Iterator[list[str]]:
        yield ["ranks", "experts of a layer", "parameters", "in experts", "in routers", "all other"]
        distinct = list(self.ranks[:-1])
        for i, rank in enumerate(distinct):
            if len(distinct) <= _SHOWN or i < _SHOWN - 1 or i == len(distinct) - 1:
                ids = rank.experts[0] if rank.experts else []
                numbers = [rank.total, *(rank.parameters.get(of, 0) for of in ("experts", "router", "dense"))]
                yield [shortened(rank.groups["edp"]), shortened(ids), *(f"{number:,}" for number in numbers)]
            elif i == _SHOWN - 1:
                yield ["..."]
        experts = sum(rank.parameters.get("experts", 0) * len(rank.groups["edp"]) for rank in distinct)
        everything = sum(rank.total * len(rank.groups["edp"]) for rank in distinct)
        yield ["all ranks together", "", f"{everything:,}", f"{experts:,}"]

    def _sent_rows(self) -> Iterator[list[str]]:
        sent = estimate_communication(self.config, self.world_size)
        yield ["sent by a rank in a step", "bytes", "GiB"]
        for operation, size in (asdict(sent) | {"total": sent.total}).items():
            yield [operation.replace("_", "-"), f"{size:,}", f"{size / 2**30:,.2f}"]


def dry_run(config: Config, world_size: int) -> DryRun:
    """Be each rank that differs from others, and the last one, in turn.

    Args:
        config: complete, with `model.vocab_size` set, and possible: see `refuse_impossible`.
        world_size: number of ranks.
    """
    settings = deepspeed_config(config, world_size, device_type(config))
    ranks = [
        _look_at(config, rank, world_size, settings)
        for rank in (*range(config.parallel.ep_size), world_size - 1)
    ]
    return DryRun(config, world_size, ranks, settings)


def _look_at(config: Config, rank: int, world_size: int, settings: dict[str, Any]) -> Rank:
    """Make the groups and the model of one rank."""
    with rank_alone(rank, world_size, config.parallel.ep_size) as world:
        check_settings(settings)
        with torch.device("meta"):
            model = Transformer(config, choose_dispatcher(world.groups, config.parallel))
        roles, sizes, others = parameter_roles(model), Counter[str](), set()
        for name, parameter in model.named_parameters():
            sizes[family(roles[name])] += parameter.numel()
            if roles[name] != "experts":
                others.add((name, parameter.shape))
        experts = [module.expert_ids for module in model.modules() if isinstance(module, GroupedExperts)]
        return Rank(rank, world.groups.members(), dict(sizes), tuple(experts), frozenset(others))


def parameters_of_a_rank(counts: ModelCounts, ep_size: int) -> dict[str, int]:
    """What a rank should hold by family, from the count of the whole model."""
    experts, router = counts.by_part.get("routed_experts", 0), counts.by_part.get("router", 0)
    held = {"dense": counts.total - experts - router, "router": router, "experts": experts // ep_size}
    return {name: size for name, size in held.items() if size}


def refuse_impossible(config: Config, world_size: int, gpu: GPU | None) -> None:
    """Name the first thing that makes a run on this many ranks impossible.

    Raises:
        ConfigError: the experts or the global batch do not split over the ranks, or one does not fit `gpu`.
    """
    Topology(world_size, config.parallel.ep_size)
    config.accumulation_steps(world_size)
    if gpu is None:
        return
    if device_type(config) == "cpu":
        raise ConfigError("parallel.device", f"is cpu; leave it out, or leave out --gpu {gpu.name}")
    peak, usable = estimate_memory(config, world_size, "cuda").peak, USABLE * gpu.memory
    if peak <= usable:
        return
    problem = f"a rank takes {gib(peak)} of the usable {gib(usable)} of {gpu.name}"
    best = placements(config, world_size, gpu.memory)[0]
    if best.fits:
        key, *_ = changes = _changes(config, best)
        settings = " ".join(f"{name}={value}" for name, value in changes.items())
        raise ConfigError(key, f"{problem}; use {settings}, which takes {gib(best.memory.peak)}")
    least = f"{gib(best.memory.peak)} is the least with any ep_size, ZeRO stage and recomputation"
    enough = _enough_ranks(config, world_size, gpu)
    fix = f"--world {enough}" if enough else "a GPU with more memory"
    raise ConfigError("--world", f"{problem}, and {least}; use {fix}")


def _enough_ranks(config: Config, world_size: int, gpu: GPU) -> int | None:
    """The least number of ranks, doubled from this one, that has a placement on `gpu`; None if none has."""
    train = config.train
    while train.global_batch_size % (2 * world_size * train.micro_batch_size) == 0:
        world_size *= 2
        if placements(config, world_size, gpu.memory)[0].fits:
            return world_size
    return None


def _changes(config: Config, place: Placement) -> dict[str, str]:
    """The keys that this placement sets to another value."""
    wanted = {
        "parallel.ep_size": (config.parallel.ep_size, place.ep_size),
        "parallel.zero_stage": (config.parallel.zero_stage, place.zero_stage),
        "train.activation_checkpointing": (
            config.train.activation_checkpointing,
            place.activation_checkpointing,
        ),
    }
    return {key: str(better).lower() for key, (own, better) in wanted.items() if own != better}


def device_type(config: Config) -> str:
    """The kind of device that a run of many ranks has: GPUs, unless the configuration says `cpu`."""
    return "cpu" if config.parallel.device == "cpu" else "cuda"


def shortened(numbers: Sequence[int]) -> str:
    """Evenly spaced numbers, such as `0, 8, ..., 56`."""
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers)) or "-"
    return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"
