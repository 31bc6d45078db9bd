"""What a sparse model is and costs, as integers from its configuration; no weights are allocated.

Conventions: a matrix of n weights takes 2 n FLOPs per token forward and 4 n backward; embeddings are looked
up for free; norms, softmax, rotary positions and the weighted sum over a token's experts are not counted,
after Kaplan et al. 2020, table 1.
"""

from dataclasses import dataclass

from moe.config import Config, moe_layers

# Peak dense bf16 FLOP/s by the name that torch reports, from NVIDIA's data sheets (no sparsity).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


@dataclass(frozen=True)
class Ledger:
    """Counts of one architecture.

    Attributes:
        by_part: parameters of each part, all experts included.
        params_total: every parameter.
        params_active: parameters that one token meets, embeddings included (`active_all`).
        params_active_no_input_emb: without the input embedding; a tied one is counted nowhere then.
        params_active_no_emb: without input embedding and output head.
        flops_per_token_forward: of one token in a sequence of `data.seq_len`, causal attention.
        flops_per_token_train: forward and backward, without recomputation.
    """

    by_part: dict[str, int]
    params_total: int
    params_active: int
    params_active_no_input_emb: int
    params_active_no_emb: int
    flops_per_token_forward: int
    flops_per_token_train: int


def count(config: Config) -> Ledger:
    """Count parameters and FLOPs. `model.vocab_size` must be resolved."""
    model, moe = config.model, config.moe
    assert model.vocab_size is not None, "model.vocab_size must be resolved from the tokenizer"
    d, heads_width, kv_width = (
        model.d_model,
        model.n_heads * model.head_dim,
        model.n_kv_heads * model.head_dim,
    )
    n_moe_positions = len(moe_layers(model, moe))
    n_sparse = 0 if moe.is_dense else n_moe_positions
    expert = 3 * d * moe.d_ff_expert
    dense = (model.n_layers - n_moe_positions) * 3 * d * model.d_ff
    if moe.is_dense:
        dense += n_moe_positions * (1 + moe.num_shared_experts) * expert
    by_part = {
        "embedding": model.vocab_size * d,
        "attention": model.n_layers * (2 * d * heads_width + 2 * d * kv_width),
        "norms": (2 * model.n_layers + 1) * d + (2 * model.n_layers * model.head_dim if model.qk_norm else 0),
        "dense_blocks": dense,
        "router": n_sparse * d * moe.num_experts,
        "routed_experts": n_sparse * moe.num_experts * expert,
        "shared_experts": n_sparse * moe.num_shared_experts * expert,
        "head": 0 if model.tie_embeddings else model.vocab_size * d,
    }
    total = sum(by_part.values())
    active = total - n_sparse * (moe.num_experts - moe.top_k) * expert
    without_input = active - by_part["embedding"]
    without_both = without_input - by_part["head"]
    matrices = without_both - by_part["norms"] + model.vocab_size * d  # the head multiplies, tied or not
    mean_context = (config.data.seq_len + 1) / 2
    attention_flops = model.n_layers * 4 * heads_width * mean_context
    forward = 2 * matrices + int(attention_flops)
    return Ledger(by_part, total, active, without_input, without_both, forward, 3 * forward)


def estimate_memory(config: Config, world_size: int) -> dict[str, int]:
    """Bytes on one rank, by part. A rough guide: allocator slack, caches and the interpreter come on top."""
    ledger, model = count(config), config.model
    experts = ledger.by_part["routed_experts"]
    held = ledger.params_total - experts + experts // config.parallel.ep_size
    width = 2 if config.parallel.precision == "bf16" else 4
    tokens = config.train.micro_batch_size * config.data.seq_len
    attention = 4 * model.d_model + 2 * model.n_heads * model.head_dim + 2 * model.n_kv_heads * model.head_dim
    per_token = [attention + _ffn_activations(config, layer) for layer in range(model.n_layers)]
    if config.train.activation_checkpointing:
        per_token = [model.n_layers * model.d_model, max(per_token)]
    assert model.vocab_size is not None
    return {
        "weights": held * width,
        "gradients": held * width,
        "optimizer": ledger.params_total * 12 // world_size,  # fp32 master and two moments, split by ZeRO
        "activations": tokens * sum(per_token) * width,
        "logits": tokens * model.vocab_size * 3 * 4,
    }


def _ffn_activations(config: Config, layer: int) -> int:
    """Elements that a feed-forward part keeps per token for the backward pass."""
    model, moe = config.model, config.moe
    shared = moe.num_shared_experts * moe.d_ff_expert
    if layer not in moe_layers(model, moe):
        return 2 * model.d_model + 4 * model.d_ff
    if moe.is_dense:
        return 2 * model.d_model + 4 * (moe.d_ff_expert + shared)
    return moe.top_k * (3 * model.d_model + 4 * moe.d_ff_expert) + 4 * shared


def describe(config: Config, world_size: int) -> str:
    """The table that a run opens with: total against active parameters, FLOPs and memory."""
    ledger, memory = count(config), estimate_memory(config, world_size)
    sparse = f"{config.moe.num_experts} experts, top-{config.moe.top_k}"
    rows = [
        ("model", "dense" if config.moe.is_dense else sparse),
        ("parameters, total", f"{ledger.params_total:,}"),
        ("parameters, active per token", f"{ledger.params_active:,}"),
        ("  without input embedding", f"{ledger.params_active_no_input_emb:,}"),
        ("  without both embeddings", f"{ledger.params_active_no_emb:,}"),
        ("total / active", f"{ledger.params_total / ledger.params_active:.2f}"),
        ("FLOPs per token, forward", f"{ledger.flops_per_token_forward:,}"),
        ("FLOPs per token, training", f"{ledger.flops_per_token_train:,}"),
        ("state and activations per rank", f"{sum(memory.values()) / 2**30:.2f} GiB"),
        *((f"  {part}", f"{size / 2**30:.2f} GiB") for part, size in memory.items()),
    ]
    return "\n".join(f"  {name:<30} {value:>22}" for name, value in rows)


def peak_flops(device_name: str | None) -> float | None:
    """Peak dense bf16 FLOP/s of a device by torch's name for it, or None where it is not known."""
    known = (peak for name, peak in PEAK_FLOPS.items() if device_name is not None and name in device_name)
    return next(known, None)
