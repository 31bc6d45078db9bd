"""Bytes that one rank sends in an optimizer step, from the configuration alone."""

from dataclasses import dataclass

from moe.accounting.counts import count_parameters
from moe.config import Config

FP32 = 4  # bytes


@dataclass(frozen=True)
class Communication:
    """Bytes that one rank sends to other ranks in an optimizer step, by operation."""

    # Token rows with gate weights and expert ids sent to the experts, outputs sent back, gradients of both.
    all_to_all: int
    gradients: int  # ring all-reduce of the gradients in fp32, `2 (n - 1) / n` of their size
    weights: int  # ring all-gather of the updated weights, `(n - 1) / n` of their size

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.all_to_all + self.gradients + self.weights


def estimate_communication(config: Config, world_size: int) -> Communication:
    """Estimate what one of `world_size` ranks sends in an optimizer step, with uniform routing.

    Raises:
        ConfigError: the global batch does not split evenly over the ranks.
    """
    counts, parallel, width = count_parameters(config), config.parallel, bytes_per_value(config)
    micro_batches = config.accumulation_steps(world_size)
    experts = counts.by_part.get("routed_experts", 0)
    # Parameters times the share that a rank sends in a ring algorithm. An expert has world_size / ep_size
    # copies, all other parameters have world_size copies.
    sent = (counts.total - experts) * (1 - 1 / world_size)
    sent += experts // parallel.ep_size * (1 - parallel.ep_size / world_size)
    passes = 3 if config.train.activation_checkpointing else 2
    choices = config.moe.top_k if parallel.dispatch == "once_per_rank" else 1  # weights and ids per row
    row_bytes = 2 * passes * width * config.model.d_model + passes * 2 * FP32 * choices
    rows = rows_per_token(config) * (1 - 1 / parallel.ep_size)
    tokens = micro_batches * config.train.micro_batch_size * config.data.seq_len
    return Communication(
        all_to_all=int(tokens * len(config.moe_layers) * rows * row_bytes),
        gradients=int(2 * sent * FP32 * (micro_batches if parallel.zero_stage == 2 else 1)),
        weights=int(sent * width),
    )


def all_to_all_calls(config: Config, world_size: int) -> int:
    """How often a rank calls all-to-all in an optimizer step, each time with all ranks of its `ep_group`.

    A layer sends counts, choices, rows, and rows back; its backward pass the last three, and so does a
    recomputed forward pass.

    Raises:
        ConfigError: the global batch does not split evenly over the ranks.
    """
    if config.parallel.ep_size == 1:
        return 0
    calls = 4 + 3 + 3 * config.train.activation_checkpointing
    return config.accumulation_steps(world_size) * len(config.moe_layers) * calls


def rows_per_token(config: Config) -> float:
    """Expected number of rows sent per token, rows to the token's own rank included, with uniform routing.

    0 if the experts are not split over ranks. With `once_per_rank` it is the expected number of distinct
    ranks among the K experts of a token, `R (1 - C(E - E/R, K) / C(E, K))`.
    """
    ranks, experts, top_k = config.parallel.ep_size, config.moe.num_experts, config.moe.top_k
    if ranks == 1:
        return 0.0
    if config.parallel.dispatch == "once_per_expert":
        return float(top_k)
    missed = 1.0  # probability that a rank holds none of the K experts
    for i in range(top_k):
        missed *= max(0, experts - experts // ranks - i) / (experts - i)
    return ranks * (1 - missed)


def bytes_per_value(config: Config) -> int:
    """Bytes of one weight or activation in the training precision."""
    return 2 if config.parallel.precision == "bf16" else FP32
