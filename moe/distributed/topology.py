"""Which ranks split the experts, and which hold the same ones, as lists of ranks."""

from dataclasses import dataclass

from moe.config import ConfigError


@dataclass(frozen=True)
class Topology:
    """Consecutive ranks split the experts of a layer, so that dispatch stays within a node if possible.

    Ranks `ep_size` apart hold the same experts: `ep_size * edp_size == world_size`.

    Attributes:
        world_size: number of ranks.
        ep_size: ranks that split the experts of a layer.

    Raises:
        ConfigError: `ep_size` does not divide `world_size`.
    """

    world_size: int
    ep_size: int

    def __post_init__(self):
        if self.world_size % self.ep_size:
            problem = f"{self.ep_size} does not divide the {self.world_size} ranks"
            enough = self.ep_size * (self.world_size // self.ep_size + 1)
            raise ConfigError("parallel.ep_size", f"{problem}; use a divisor, or start {enough} ranks")

    @property
    def ep_groups(self) -> list[list[int]]:
        """Ranks that split the experts, group by group."""
        starts = range(0, self.world_size, self.ep_size)
        return [list(range(start, start + self.ep_size)) for start in starts]

    @property
    def edp_groups(self) -> list[list[int]]:
        """Ranks that hold the same experts, group by group."""
        return [list(range(rank, self.world_size, self.ep_size)) for rank in range(self.ep_size)]

    def ep_rank(self, rank: int) -> int:
        """Place of a rank within its `ep_group`."""
        return rank % self.ep_size
