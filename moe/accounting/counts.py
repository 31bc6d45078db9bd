"""What a model is, as integers from its configuration: parameters and FLOPs by part; nothing is built.

Conventions: a matrix of n weights takes 2 n FLOPs per token forward and 4 n backward; embeddings are looked
up for free; norms, softmax, rotary positions and the weighted sum over a token's experts are not counted,
after Kaplan et al. 2020, table 1. Attention is causal: a position meets (S + 1) / 2 keys on average.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from moe.config import Config, ModelConfig

PARTS = (
    "embedding",
    "attention",
    "norms",
    "dense_blocks",
    "router",
    "routed_experts",
    "shared_experts",
    "other",
    "head",
)


@dataclass(frozen=True)
class ModelCounts:
    """Counts of one architecture.

    Attributes:
        name: for people.
        seq_len: tokens per sequence, to which the attention FLOPs belong.
        by_part: parameters of each part that there is, all experts included; a subset of `PARTS`.
        idle: parameters of routed experts that one token does not meet.
        flops_by_part: FLOPs per token of the forward pass, active experts only.
        layers: parameters of each layer by part, first layer first; with embedding, head and final norm, they
            make up `by_part`.
    """

    name: str
    seq_len: int
    by_part: dict[str, int]
    idle: int
    flops_by_part: dict[str, int]
    layers: tuple[dict[str, int], ...] = field(default=())

    @property
    def total(self) -> int:
        """Every parameter; a tied embedding once."""
        return sum(self.by_part.values())

    @property
    def active_all(self) -> int:
        """Parameters that one token meets, both embeddings included."""
        return self.total - self.idle

    @property
    def active_no_input_emb(self) -> int:
        """`active_all` without the input embedding; a tied one is counted nowhere then."""
        return self.active_all - self.by_part["embedding"]

    @property
    def active_no_emb(self) -> int:
        """`active_all` without input embedding and output head."""
        return self.active_no_input_emb - self.by_part.get("head", 0)

    @property
    def sparsity(self) -> float:
        """`total / active_all`."""
        return self.total / self.active_all

    @property
    def flops_per_token_forward(self) -> int:
        """Of one token in a sequence of `seq_len`."""
        return sum(self.flops_by_part.values())

    @property
    def flops_per_token_train(self) -> int:
        """Forward and backward, nothing computed twice. Utilisation (MFU) is measured in these."""
        return 3 * self.flops_per_token_forward

    @property
    def flops_per_token_recompute(self) -> int:
        """Forward and backward with activation checkpointing: every block runs forward once more.

        Of a dense block torch may leave out the last product, which nothing needs.
        """
        return self.flops_per_token_train + self.flops_per_token_forward - self.flops_by_part.get("head", 0)

    def layer_kinds(self) -> list[tuple[int, dict[str, int]]]:
        """Runs of equal layers from the first on: how many, and the parameters of each one."""
        return [(len(list(run)), parts) for parts, run in groupby(self.layers)]

    def record(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "name": self.name,
            "total": self.total,
            "active_all": self.active_all,
            "active_no_input_emb": self.active_no_input_emb,
            "active_no_emb": self.active_no_emb,
            "sparsity": self.sparsity,
            "by_part": self.by_part,
            "layers": [{"layers": number, "each": parts} for number, parts in self.layer_kinds()],
            "seq_len": self.seq_len,
            "flops_per_token_forward": self.flops_per_token_forward,
            "flops_per_token_train": self.flops_per_token_train,
            "flops_per_token_recompute": self.flops_per_token_recompute,
            "flops_by_part": self.flops_by_part,
        }


def count_parameters(config: Config) -> ModelCounts:
    """Count the parameters and FLOPs of a configuration.

    Raises:
        ConfigError: `model.vocab_size` is null.
    """
    model, moe = config.model, config.moe
    layers = tuple(_count_layer(config, layer) for layer in range(model.n_layers))
    embedding = config.vocab_size * model.d_model
    by_part = Counter(embedding=embedding, norms=model.d_model, head=0 if model.tie_embeddings else embedding)
    for layer in layers:
        by_part.update(layer)
    idle = by_part["routed_experts"] * (moe.num_experts - moe.top_k) // moe.num_experts
    matrices = Counter({part: 2 * by_part[part] for part in by_part if part not in ("embedding", "norms")})
    matrices["head"] = 2 * embedding  # it multiplies, tied or not
    matrices["routed_experts"] -= 2 * idle
    scores = model.n_layers * causal_attention_flops(
        model.n_heads, model.head_dim, model.head_dim, config.data.seq_len
    )
    return ModelCounts(
        config.run.name,
        config.data.seq_len,
        {part: by_part[part] for part in PARTS if by_part[part]},
        idle,
        {part: matrices[part] + (scores if part == "attention" else 0) for part in PARTS if matrices[part]},
        layers,
    )


def causal_attention_flops(n_heads: int, qk_dim: int, v_dim: int, seq_len: int) -> int:
    """Scores and weighted values of one layer, forward, per token: `2 H (Q + V)` FLOPs per key met."""
    return n_heads * (qk_dim + v_dim) * (seq_len + 1)


def _count_layer(config: Config, layer: int) -> dict[str, int]:
    model, moe = config.model, config.moe
    expert = 3 * model.d_model * moe.d_ff_expert
    heads = 2 * model.n_heads + 2 * model.n_kv_heads  # query, key, value, output
    parts = {
        "attention": heads * model.d_model * model.head_dim,
        "norms": 2 * model.d_model + qk_norms(model),
    }
    if layer not in config.moe_layers:
        return parts | {"dense_blocks": 3 * model.d_model * model.d_ff}
    if moe.is_dense:
        return parts | {"dense_blocks": (1 + moe.num_shared_experts) * expert}
    return parts | {
        "router": model.d_model * moe.num_experts,
        "routed_experts": moe.num_experts * expert,
        "shared_experts": moe.num_shared_experts * expert,
    }


def qk_norms(model: ModelConfig) -> int:
    """Weights of the norms of queries and keys in one layer."""
    if not model.qk_norm:
        return 0
    return (2 if model.qk_norm_scope == "head" else model.n_heads + model.n_kv_heads) * model.head_dim
