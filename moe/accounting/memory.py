"""Peak memory of one rank, from the configuration alone.

The peak is either in the forward and backward pass, with the activations, or in the update, with two copies
of the shard's gradients. Python, the libraries and freed memory that stays with the process are not included,
nor what oneDNN keeps on a CPU for every number of rows that it has met: half a MiB each, by default at most
1,024.
"""

from dataclasses import asdict, dataclass

from moe.accounting.communication import FP32, bytes_per_value, rows_per_token
from moe.accounting.counts import count_parameters
from moe.config import Config
from moe.model import LOGITS_AT_ONCE
from moe.training.deepspeed_config import reduce_bucket

MOMENTS_BYTES = 8  # Adam's two, per parameter


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part."""

    weights: int  # in the training precision; of the routed experts only the rank's own
    optimizer: int  # the rank's ZeRO shard of Adam's moments and, in bf16, of fp32 master weights
    gradients: int  # in fp32; under ZeRO 2 only the rank's shard; in bf16 under ZeRO 1 the bf16 ones too
    bucket: int  # DeepSpeed's buffer for reducing gradients; a single process under ZeRO 1 needs none
    activations: int  # what the forward pass keeps for the backward pass
    recomputed: int  # activations of the block that is being recomputed, with activation checkpointing
    temporary: int  # what the backward pass of one feed-forward block takes for itself
    dispatch: int  # rows sent to the experts of one layer and back; 0 if the experts are not split over ranks
    loss: int  # logits in fp32, log-softmax and gradients of a chunk; gradients that chunks add up to
    update: int  # gradients of the rank's shard, all that is left by then, and AdamW's fp32 copy of them
    accumulates: bool  # whether gradients of earlier micro batches exist during a forward pass

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment of a step."""
        earlier = self.gradients * self.accumulates
        loss = self.activations + self.dispatch + self.loss + earlier
        # The backward pass frees activations while it adds gradients.
        backward = (
            max(self.activations + earlier, self.gradients) + self.recomputed + self.temporary + self.dispatch
        )
        always = self.weights + self.optimizer + self.bucket
        return always + max(loss, backward, self.update)

    def by_part(self) -> dict[str, int]:
        """Bytes by part. Their sum exceeds `peak`, because the parts do not all exist at the same time."""
        return {name: size for name, size in asdict(self).items() if name != "accumulates"}


def estimate_memory(config: Config, world_size: int, device: str) -> Memory:
    """Estimate the memory of one of `world_size` ranks on `cpu` or a GPU, with evenly used experts.

    Raises:
        ConfigError: `model.vocab_size` is null, or the global batch does not split evenly over the ranks.
    """
    counts, model, parallel = count_parameters(config), config.model, config.parallel
    experts = counts.by_part.get("routed_experts", 0)
    held = counts.total - experts + experts // parallel.ep_size
    width = bytes_per_value(config)
    share = counts.total // world_size  # of experts too: E / ep_size of them, over world_size / ep_size ranks
    tokens = config.train.micro_batch_size * config.data.seq_len
    blocks = [_block_activations(config, layer) for layer in range(model.n_layers)]
    recomputes = config.train.activation_checkpointing
    kept = model.n_layers * width * model.d_model if recomputes else sum(blocks)
    mask = config.data.seq_len * width * config.data.document_masks  # one for all layers
    final_norm = (2 * FP32 + width) * model.d_model
    embedding = _dropout_mask(config)
    accumulated = FP32 if width == FP32 else FP32 + width
    routers = counts.by_part.get("router", 0) * (FP32 - width)  # which stay in fp32
    return Memory(
        weights=held * width + routers,
        optimizer=share * (MOMENTS_BYTES + (FP32 if width != FP32 else 0)),
        gradients=share * FP32 if parallel.zero_stage == 2 else held * accumulated,
        bucket=reduce_bucket(config, world_size, device) * width,
        activations=tokens * (embedding + kept + final_norm + mask),
        recomputed=tokens * max(blocks) if recomputes else 0,
        temporary=tokens * max(_temporary(config, layer, device) for layer in range(model.n_layers)),
        dispatch=int(tokens * 2 * rows_per_token(config) * model.d_model * width),
        loss=_loss(config, tokens),
        update=share * 2 * FP32,
        accumulates=config.accumulation_steps(world_size) > 1,
    )


def _temporary(config: Config, layer: int, device: str) -> int:
    """Bytes per token that the backward pass of a feed-forward block takes for the rows it works on at once.

    Four tensors of the hidden width; of width d_model two of the rows' gradients and, in a sparse block,
    copies of the rows and of the output's gradients. Routed and shared experts take their turns. Where routed
    experts work one after the other, as they can in fp32 on a CPU, they add to the gradient of all tokens.
    """
    model, moe, width = config.model, config.moe, bytes_per_value(config)
    hidden = _dense_width(config, layer)
    dense = width * (4 * hidden + 2 * model.d_model) if hidden else 0
    if layer not in config.moe_layers or moe.is_dense:
        return dense
    rows = moe.top_k * min(1.0, moe.capacity_factor or 1.0)
    sparse = width * rows * (4 * moe.d_ff_expert + 4 * model.d_model)
    if device == "cpu" and width == FP32 and _one_after_the_other(config):
        sparse = sparse * config.parallel.ep_size / moe.num_experts + width * model.d_model
    return max(dense, int(sparse))


def _loss(config: Config, tokens: int) -> int:
    """Bytes that the cross-entropy takes; see `moe.model.losses.cross_entropy`."""
    logits, width = tokens * config.vocab_size, bytes_per_value(config)
    if logits <= LOGITS_AT_ONCE:
        return 3 * FP32 * logits
    of_weight = config.vocab_size * config.model.d_model * (FP32 + width)
    return 3 * FP32 * LOGITS_AT_ONCE + of_weight + tokens * config.model.d_model * width


def _one_after_the_other(config: Config) -> bool:
    """Whether the routed experts work so in fp32 on this machine's CPU."""
    from moe.model.grouped_swiglu import one_after_the_other  # with torch, which GPUs' estimates do without

    model, moe = config.model, config.moe
    rows = config.train.micro_batch_size * config.data.seq_len * moe.top_k
    shape = moe.num_experts // config.parallel.ep_size, model.d_model, moe.d_ff_expert
    return one_after_the_other(shape, rows)


def _dense_width(config: Config, layer: int) -> int:
    """Hidden width of what every token passes: a dense block, or the shared experts of a sparse one."""
    moe = config.moe
    if layer not in config.moe_layers:
        return config.model.d_ff
    return (moe.num_shared_experts + moe.is_dense) * moe.d_ff_expert


def _dropout_mask(config: Config) -> int:
    """Bytes per token of what one dropout keeps, a bool for each feature."""
    return config.model.d_model if config.model.dropout else 0


def _block_activations(config: Config, layer: int) -> int:
    """Bytes per token of the tensors that a block saves for its backward pass, module by module."""
    model, moe, width = config.model, config.moe, bytes_per_value(config)
    norm = 2 * FP32 * model.d_model  # input and normalized rows, in fp32
    heads = 3 * model.n_heads + 2 * model.n_kv_heads  # queries, output twice; keys, values
    attention = norm + width * (model.d_model + heads * model.head_dim) + FP32 * model.n_heads
    if model.qk_norm:
        attention += 2 * FP32 * (model.n_heads + model.n_kv_heads) * model.head_dim
    attention += 2 * _dropout_mask(config)
    hidden = _dense_width(config, layer)
    if layer not in config.moe_layers or moe.is_dense:
        return attention + norm + width * (model.d_model + 2 * hidden)
    router = FP32 * (model.d_model + 2 * moe.num_experts)
    rows = moe.top_k * min(1.0, moe.capacity_factor or 1.0)
    experts = int(width * rows * 2 * moe.d_ff_expert) + width * 2 * hidden
    tokens = width * model.d_model if width != FP32 else 0  # in fp32 they are the router's
    return attention + norm + router + tokens + experts
