"""Bytes that one rank sends in a step, from the configuration."""

from dataclasses import dataclass

from moe.accounting.counts import count_parameters
from moe.config import Config

FP32 = 4  # bytes


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends to others in an optimizer step, by ring algorithms where all ranks take part.

    Attributes:
        all_to_all: token rows, gate weights and expert ids to the experts, outputs back, and the gradients of
            both, under uniform routing.
        gradients: all-reduce of the gradients, `2 (n - 1) / n` of their bytes.
        weights: all-gather of the updated weights, `(n - 1) / n` of their bytes.
    """

    all_to_all: int
    gradients: int
    weights: int

    @property
    def total(self) -> int:
        """All three."""
        return self.all_to_all + self.gradients + self.weights


def estimate_communication(config: Config, world_size: int) -> Communication:
    """What one rank of `world_size` sends in an optimizer step.

    Raises:
        ConfigError: the global batch does not split evenly over the ranks.
    """
    counts, parallel, moe = count_parameters(config), config.parallel, config.moe
    width = bytes_per_value(config)
    forwards = config.accumulation_steps(world_size)
    experts = counts.by_part.get("routed_experts", 0) // parallel.ep_size
    others = counts.total - counts.by_part.get("routed_experts", 0)
    # Parameters times the share of them that a ring sends on: all ranks hold the others, edp ranks an expert.
    sent = others * (1 - 1 / world_size) + experts * (1 - parallel.ep_size / world_size)
    rows = rows_per_token(config) * (1 - 1 / parallel.ep_size)
    passes = 3 if config.train.activation_checkpointing else 2
    choices = moe.top_k if parallel.dispatch == "once_per_rank" else 1  # gate weights and ids with a row
    row_bytes = 2 * passes * width * config.model.d_model + passes * 2 * FP32 * choices
    tokens = forwards * config.train.micro_batch_size * config.data.seq_len
    return Communication(
        all_to_all=int(tokens * len(config.moe_layers) * rows * row_bytes),
        gradients=int(2 * sent * width * (forwards if parallel.zero_stage == 2 else 1)),
        weights=int(sent * width),
    )


def rows_per_token(config: Config) -> float:
    """Rows that a token takes to the ranks of its experts, its own included, under uniform routing.

    0 where no experts are elsewhere. Once per rank: the expected number of distinct ranks,
    `R (1 - C(E - E/R, K) / C(E, K))`.
    """
    ranks, experts, top_k = config.parallel.ep_size, config.moe.num_experts, config.moe.top_k
    if ranks == 1:
        return 0.0
    if config.parallel.dispatch == "once_per_expert":
        return float(top_k)
    missed = 1.0
    for i in range(top_k):
        missed *= max(0, experts - experts // ranks - i) / (experts - i)
    return ranks * (1 - missed)


def bytes_per_value(config: Config) -> int:
    """Of weights and activations, in the training precision."""
    return 2 if config.parallel.precision == "bf16" else FP32
