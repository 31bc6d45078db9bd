"""Which parallel layouts fit a GPU, best first."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from moe.accounting.communication import Communication, estimate_communication
from moe.accounting.memory import Memory, estimate_memory
from moe.config import Config

USABLE = 0.9  # of a GPU's memory; the rest is left for its context, libraries and fragmentation


@dataclass(frozen=True)
class Placement:
    """One way to place a run on GPUs."""

    ep_size: int
    zero_stage: Literal[1, 2]
    activation_checkpointing: bool
    memory: Memory
    communication: Communication
    fits: bool

    def record(self) -> dict[str, Any]:
        """All values for JSON, sizes in bytes."""
        memory = {"peak": self.memory.peak, **self.memory.by_part()}
        communication = {"total": self.communication.total, **asdict(self.communication)}
        return asdict(self) | {"memory": memory, "communication": communication}


def placements(config: Config, world_size: int, memory_bytes: int) -> list[Placement]:
    """All combinations of `ep_size`, ZeRO stage and activation checkpointing, best first.

    Placements that fit into `USABLE` of a GPU's memory come first; of these, those without recomputation,
    then those with the fewest bytes sent, then those with the lowest peak memory. Placements that do not fit
    are ordered by peak memory. All other settings are those of the configuration.
    """
    found = []
    largest = min(world_size, config.moe.num_experts)
    for ep_size, zero_stage, checkpointing in product(range(1, largest + 1), (1, 2), (False, True)):
        if world_size % ep_size or config.moe.num_experts % ep_size:
            continue
        parallel = config.parallel.model_copy(update={"ep_size": ep_size, "zero_stage": zero_stage})
        train = config.train.model_copy(update={"activation_checkpointing": checkpointing})
        variant = config.model_copy(update={"parallel": parallel, "train": train})
        memory = estimate_memory(variant, world_size, "cuda")
        communication = estimate_communication(variant, world_size)
        fits = memory.peak <= USABLE * memory_bytes
        found.append(Placement(ep_size, zero_stage, checkpointing, memory, communication, fits))

    def rank(place: Placement) -> tuple[float, ...]:
        if not place.fits:
            return 1, place.memory.peak
        return 0, place.activation_checkpointing, place.communication.total, place.memory.peak

    return sorted(found, key=rank)
