"""The process groups of a run, made once and handed to whoever needs them."""

from dataclasses import dataclass

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
