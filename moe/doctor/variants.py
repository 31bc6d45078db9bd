"""The ways to run one configuration that are compared, and a version of it small enough to try them all."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from moe.config import Config, ConfigError


class Variant(NamedTuple):
    """One way to run train.py."""

    ranks: int
    ep_size: int
    zero_stage: int
    micro_batch_size: int

    @property
    def title(self) -> str:
        """As it is printed."""
        experts = f"ranks {self.ranks}, ep {self.ep_size}"
        return f"{experts}, ZeRO {self.zero_stage}, micro batch {self.micro_batch_size}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"ranks{self.ranks}-ep{self.ep_size}-zero{self.zero_stage}-micro{self.micro_batch_size}"

    def overrides(self, folder: Path) -> list[str]:
        """For train.py, whose run goes into a folder of this one."""
        return [
            f"run.dir={folder / self.name}",
            f"parallel.ep_size={self.ep_size}",
            f"parallel.zero_stage={self.zero_stage}",
            f"train.micro_batch_size={self.micro_batch_size}",
        ]


def variants(config: Config, rank_counts: Sequence[int], every: bool) -> Iterator[Variant]:
    """Every way to run it on these numbers of ranks, one rank first.

    With `every`, also with both ZeRO stages, and with micro batches of 4 and 1.
    """
    stages = (1, 2) if every else (config.parallel.zero_stage,)
    micro_batches = (4, 1) if every else (config.train.micro_batch_size,)
    for ranks in rank_counts:
        for ep_size in range(1, ranks + 1):
            if ranks % ep_size == 0 and config.moe.num_experts % ep_size == 0:
                for stage in stages:
                    for micro in micro_batches:
                        yield Variant(ranks, ep_size, stage, micro)


def shrunk(config: Config, rank_counts: Sequence[int]) -> list[str]:
    """Overrides that make each step a matter of milliseconds; experts and routing stay as they are."""
    model, moe = config.model, config.moe
    heads = min(model.n_heads, 4)
    return [
        f"model.d_model={min(model.d_model, 64)}",
        f"model.n_layers={min(model.n_layers, moe.first_dense_layers + 2 * moe.every_n_layers)}",
        f"model.n_heads={heads}",
        f"model.n_kv_heads={max(1, heads * model.n_kv_heads // model.n_heads)}",
        f"model.head_dim={min(model.head_dim, 16)}",
        f"model.d_ff={min(model.d_ff, 128)}",
        f"moe.d_ff_expert={min(moe.d_ff_expert, 64)}",
        f"data.seq_len={min(config.data.seq_len, 64)}",
        f"train.global_batch_size={4 * math.lcm(*rank_counts)}",
        "train.micro_batch_size=4",
    ]


def parse_rank_counts(text: str) -> list[int]:
    """The argument of --ranks; one rank, the reference, always comes first.

    Raises:
        ConfigError: it is not a list of numbers.
    """
    counts = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > 0]
    if len(counts) != len(text.split(",")):
        raise ConfigError("--ranks", f"should be numbers such as 1,2,4, got {text!r}")
    return sorted({1, *counts})
