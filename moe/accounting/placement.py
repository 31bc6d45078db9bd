"""Which topologies fit a GPU, and which of them is best."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from moe.accounting.communication import Communication, estimate_communication
from moe.accounting.memory import Memory, estimate_memory
from moe.config import Config

USABLE = 0.9  # of a GPU's memory: the rest is for its context, its libraries and fragmentation


@dataclass(frozen=True)
class Placement:
    """One way to put a run on GPUs."""

    ep_size: int
    zero_stage: Literal[1, 2]
    activation_checkpointing: bool
    memory: Memory
    communication: Communication
    fits: bool

    def record(self) -> dict[str, Any]:
        """All of it for JSON; bytes."""
        sums = {"memory": {"peak": self.memory.peak, **self.memory.by_part()}}
        return (
            asdict(self)
            | sums
            | {"communication": {"total": self.communication.total, **asdict(self.communication)}}
        )


def placements(config: Config, world_size: int, memory_bytes: int) -> list[Placement]:
    """Every `ep_size`, ZeRO stage and activation checkpointing on so many ranks, best first.

    Those that fit come first; of them those that compute nothing twice, then those that send the least, then
    those that leave the most memory free. The last ones come with the least memory first.

    Args:
        config: its micro batch, sequence length and precision are kept.
        world_size: GPUs.
        memory_bytes: of one GPU; `USABLE` of it counts.
    """
    found = []
    largest = 1 if config.train.compile else min(world_size, config.moe.num_experts)
    for ep_size in range(1, largest + 1):
        if world_size % ep_size or config.moe.num_experts % ep_size:
            continue
        for zero_stage, checkpointing in product((1, 2), (False, True)):
            parallel = config.parallel.model_copy(update={"ep_size": ep_size, "zero_stage": zero_stage})
            train = config.train.model_copy(update={"activation_checkpointing": checkpointing})
            variant = config.model_copy(update={"parallel": parallel, "train": train})
            memory = estimate_memory(variant, world_size, "cuda")
            communication = estimate_communication(variant, world_size)
            fits = memory.peak <= USABLE * memory_bytes
            found.append(Placement(ep_size, zero_stage, checkpointing, memory, communication, fits))
    return sorted(
        found,
        key=lambda place: (
            (0, place.activation_checkpointing, place.communication.total, place.memory.peak)
            if place.fits
            else (1, place.memory.peak)
        ),
    )
