"""Memory of one rank and bytes on its wire, from the configuration; which topologies fit a GPU.

Counted is what is alive at the fullest moment of a step: in the forward and backward pass with its
activations, or in the update with its copy of the gradients. Python, libraries, and what an allocator keeps
of freed memory come on top.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from moe.accounting.counts import count
from moe.config.schema import Config, moe_layers

ADAM_BYTES = 12  # fp32 master weight and two moments, of each parameter once among the ranks
FP32 = 4
# Elements. On CPU, with 33.5M parameters, 4M saved 80 of 300 ms a step against DeepSpeed's default of 500M,
# which on a GPU would take 1 GiB in bf16; 50M is unmeasured.
REDUCE_BUCKET = {"cpu": 4_000_000, "cuda": 50_000_000}
USABLE = 0.9  # of a GPU's memory: the rest is for its context, its libraries and fragmentation


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: in the training precision; of routed experts the rank's own.
        optimizer: fp32 master weights and Adam's moments; the rank's share under ZeRO.
        gradients: of one global batch; under ZeRO 2 the rank's share.
        bucket: DeepSpeed's buffer for reducing gradients.
        activations: what the forward pass keeps for the backward pass.
        recomputed: the activations of one block, where the forward pass keeps the blocks' inputs only.
        dispatch: rows on their way to the experts of one layer, and back; 0 where nothing travels.
        logits: there until the next micro batch's.
        loss: log-softmax of the logits, and the gradients of both.
        update: the copy of the gradients that AdamW reads, when the activations are gone.
        accumulates: whether gradients of earlier micro batches are there during a forward pass.
    """

    weights: int
    optimizer: int
    gradients: int
    bucket: int
    activations: int
    recomputed: int
    dispatch: int
    logits: int
    loss: int
    update: int
    accumulates: bool

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of a step."""
        earlier = self.gradients * self.accumulates
        at_the_loss = self.activations + self.dispatch + self.loss + earlier
        # Activations go as gradients come.
        going = max(self.activations + earlier, self.gradients)
        in_the_backward_pass = going + self.recomputed + self.dispatch
        in_the_update = self.gradients + self.update
        always = self.weights + self.optimizer + self.bucket + self.logits
        return always + max(at_the_loss, in_the_backward_pass, in_the_update)

    def by_part(self) -> dict[str, int]:
        """The parts by name; they are not all there at once, so `peak` is less than their sum."""
        return {name: size for name, size in asdict(self).items() if name != "accumulates"}


def estimate_memory(config: Config, world_size: int, device: str) -> Memory:
    """Memory of a rank of `world_size`, experts evenly used; `model.vocab_size` must be resolved.

    Args:
        config: complete.
        world_size: ranks.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: the global batch does not split evenly over the ranks.
    """
    ledger, parallel = count(config), config.parallel
    experts = ledger.by_part.get("routed_experts", 0)
    held = ledger.total - experts + experts // parallel.ep_size
    width = _width(config)
    share = ledger.total // world_size  # experts: E / ep_size of them, over world / ep_size ranks
    tokens = config.train.micro_batch_size * config.data.seq_len
    assert config.model.vocab_size is not None
    return Memory(
        weights=held * width,
        optimizer=share * ADAM_BYTES,
        gradients=share * FP32 if parallel.zero_stage == 2 else held * width,
        bucket=REDUCE_BUCKET[device] * width,
        activations=tokens * sum(_activations_per_token(config)),
        recomputed=tokens * _recomputed_per_token(config),
        dispatch=int(tokens * 2 * rows_per_token(config) * config.model.d_model * width),
        logits=tokens * config.model.vocab_size * width,
        loss=tokens * config.model.vocab_size * 3 * FP32,
        update=share * FP32,
        accumulates=config.accumulation_steps(world_size) > 1,
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


def _width(config: Config) -> int:
    return 2 if config.parallel.precision == "bf16" else FP32


def _activations_per_token(config: Config) -> Iterator[int]:
    """Bytes that the forward pass keeps, of each block and of the final norm."""
    for layer in range(config.model.n_layers):
        recompute = config.train.activation_checkpointing
        yield _width(config) * config.model.d_model if recompute else _block_activations(config, layer)
    yield (2 * FP32 + _width(config)) * config.model.d_model


def _recomputed_per_token(config: Config) -> int:
    if not config.train.activation_checkpointing:
        return 0
    return max(_block_activations(config, layer) for layer in range(config.model.n_layers))


def _block_activations(config: Config, layer: int) -> int:
    """The saved tensors of a block's modules in turn."""
    model, moe, width = config.model, config.moe, _width(config)
    norm = 2 * FP32 * model.d_model  # its input and the normalised rows, in fp32
    heads = 3 * model.n_heads + 2 * model.n_kv_heads  # queries, output twice; keys, values
    attention = norm + width * (model.d_model + heads * model.head_dim) + FP32 * model.n_heads
    if model.qk_norm:
        attention += 2 * FP32 * (model.n_heads + model.n_kv_heads) * model.head_dim
    if layer not in moe_layers(model, moe):
        return attention + norm + width * (model.d_model + 4 * model.d_ff)
    shared = moe.num_shared_experts * moe.d_ff_expert
    if moe.is_dense:
        return attention + norm + width * (model.d_model + 4 * (moe.d_ff_expert + shared))
    router = FP32 * (model.d_model + 2 * moe.num_experts)
    rows = moe.top_k * min(1.0, moe.capacity_factor or 1.0)
    experts = int(width * rows * (2 * model.d_model + 4 * moe.d_ff_expert))
    if shared:
        experts += width * 4 * shared + (width * model.d_model if width != FP32 else 0)
    return attention + norm + router + experts


@dataclass(frozen=True)
class Wire:
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


def estimate_wire(config: Config, world_size: int) -> Wire:
    """Bytes on the wire of a rank of `world_size`.

    Raises:
        ConfigError: the global batch does not split evenly over the ranks.
    """
    ledger, parallel, moe = count(config), config.parallel, config.moe
    width = _width(config)
    forwards = config.accumulation_steps(world_size)
    experts = ledger.by_part.get("routed_experts", 0) // parallel.ep_size
    others = ledger.total - ledger.by_part.get("routed_experts", 0)
    # Parameters times the share of them that a ring sends on: all ranks hold the others, edp ranks an expert.
    sent = others * (1 - 1 / world_size) + experts * (1 - parallel.ep_size / world_size)
    rows = rows_per_token(config) * (1 - 1 / parallel.ep_size)
    passes = 3 if config.train.activation_checkpointing else 2
    choices = moe.top_k if parallel.dispatch == "once_per_rank" else 1  # gate weights and ids with a row
    row_bytes = 2 * passes * width * config.model.d_model + passes * 2 * FP32 * choices
    tokens = forwards * config.train.micro_batch_size * config.data.seq_len
    return Wire(
        all_to_all=int(tokens * len(moe_layers(config.model, moe)) * rows * row_bytes),
        gradients=int(2 * sent * width * (forwards if parallel.zero_stage == 2 else 1)),
        weights=int(sent * width),
    )


@dataclass(frozen=True)
class Placement:
    """One way to put a run on GPUs."""

    ep_size: int
    zero_stage: Literal[1, 2]
    activation_checkpointing: bool
    memory: Memory
    wire: Wire
    fits: bool

    def record(self) -> dict[str, Any]:
        """All of it for JSON; bytes."""
        sums = {"memory": {"peak": self.memory.peak, **self.memory.by_part()}}
        return asdict(self) | sums | {"wire": {"total": self.wire.total, **asdict(self.wire)}}


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
            wire = estimate_wire(variant, world_size)
            fits = memory.peak <= USABLE * memory_bytes
            found.append(Placement(ep_size, zero_stage, checkpointing, memory, wire, fits))
    return sorted(
        found,
        key=lambda place: (
            (0, place.activation_checkpointing, place.wire.total, place.memory.peak)
            if place.fits
            else (1, place.memory.peak)
        ),
    )
