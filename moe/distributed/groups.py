"""This process among all ranks, and the process groups it belongs to."""

from dataclasses import dataclass
from typing import TextIO

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's process groups.

    Attributes:
        dp_group: all ranks; they average the gradients of everything but the experts.
        ep_group: the ranks that split the experts with this one.
        edp_group: the ranks that hold the same experts as this one; they average those experts' gradients.
        ep_size: size of `ep_group`.
        ep_rank: place of this rank in `ep_group`.
    """

    dp_group: ProcessGroup
    ep_group: ProcessGroup
    edp_group: ProcessGroup
    ep_size: int
    ep_rank: int

    def members(self) -> dict[str, list[int]]:
        """The ranks of each group, by its name `dp`, `ep` or `edp`."""
        made = {"dp": self.dp_group, "ep": self.ep_group, "edp": self.edp_group}
        return {name: torch.distributed.get_process_group_ranks(group) for name, group in made.items()}


@dataclass(frozen=True)
class World:
    """This process: its rank among `size` ranks, its device, and its process groups."""

    rank: int
    size: int
    device: torch.device
    groups: ParallelGroups

    def print(self, text: str, file: TextIO | None = None) -> None:
        """Print on rank 0 only."""
        if self.rank == 0:
            print(text, file=file, flush=True)
