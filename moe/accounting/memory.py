"""Memory of one rank, from the configuration.

Counted is what is alive at the fullest moment of a step: in the forward and backward pass with its
activations, or in the update with its copy of the gradients. Python, libraries, and what an allocator keeps
of freed memory come on top.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from moe.accounting.communication import FP32, bytes_per_value, rows_per_token
from moe.accounting.counts import count_parameters
from moe.config import Config
from moe.training.deepspeed_config import REDUCE_BUCKET

ADAM_BYTES = 12  # fp32 master weight and two moments, of each parameter once among the ranks


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
    counts, parallel = count_parameters(config), config.parallel
    experts = counts.by_part.get("routed_experts", 0)
    held = counts.total - experts + experts // parallel.ep_size
    width = bytes_per_value(config)
    share = counts.total // world_size  # experts: E / ep_size of them, over world / ep_size ranks
    tokens = config.train.micro_batch_size * config.data.seq_len
    return Memory(
        weights=held * width,
        optimizer=share * ADAM_BYTES,
        gradients=share * FP32 if parallel.zero_stage == 2 else held * width,
        bucket=REDUCE_BUCKET[device] * width,
        activations=tokens * sum(_activations_per_token(config)),
        recomputed=tokens * _recomputed_per_token(config),
        dispatch=int(tokens * 2 * rows_per_token(config) * config.model.d_model * width),
        logits=tokens * config.vocab_size * width,
        loss=tokens * config.vocab_size * 3 * FP32,
        update=share * FP32,
        accumulates=config.accumulation_steps(world_size) > 1,
    )


def _activations_per_token(config: Config) -> Iterator[int]:
    """Bytes that the forward pass keeps, of each block and of the final norm."""
    for layer in range(config.model.n_layers):
        recompute = config.train.activation_checkpointing
        yield (
            bytes_per_value(config) * config.model.d_model if recompute else _block_activations(config, layer)
        )
    yield (2 * FP32 + bytes_per_value(config)) * config.model.d_model


def _recomputed_per_token(config: Config) -> int:
    if not config.train.activation_checkpointing:
        return 0
    return max(_block_activations(config, layer) for layer in range(config.model.n_layers))


def _block_activations(config: Config, layer: int) -> int:
    """The saved tensors of a block's modules in turn."""
    model, moe, width = config.model, config.moe, bytes_per_value(config)
    norm = 2 * FP32 * model.d_model  # its input and the normalised rows, in fp32
    heads = 3 * model.n_heads + 2 * model.n_kv_heads  # queries, output twice; keys, values
    attention = norm + width * (model.d_model + heads * model.head_dim) + FP32 * model.n_heads
    if model.qk_norm:
        attention += 2 * FP32 * (model.n_heads + model.n_kv_heads) * model.head_dim
    if layer not in config.moe_layers:
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
