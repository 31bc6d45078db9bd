"""Parameters and FLOPs of a model by part, as exact integers from its configuration; no model is built.

Conventions, after Kaplan et al. 2020, table 1: a matrix of n weights takes 2 n FLOPs per token in the forward
pass and 4 n in the backward pass. Embedding lookups, norms, softmax, rotary embeddings and the weighted sum
over a token's experts are not counted. Attention is causal: a query attends to (S + 1) / 2 keys on average.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moe.config import Config, MoEConfig, check_type

PARTS = (  # in the order of all tables
    "embedding", "attention", "norms", "dense_blocks",
    "router", "routed_experts", "shared_experts", "other", "head",
)  # fmt: skip
_RECORDED = (
    "name", "total", "active_all", "active_no_input_emb", "active_no_emb", "sparsity", "by_part", "layers",
    "seq_len", "flops_per_token_forward", "flops_per_token_train", "flops_per_token_recompute",
    "flops_by_part",
)  # fmt: skip


@dataclass(frozen=True)
class ModelCounts:
    """Parameters and FLOPs of one model. The parts are those of `PARTS` that the model has."""

    name: str
    seq_len: int  # tokens per sequence, on which the attention FLOPs depend
    by_part: dict[str, int]  # parameters, all experts included
    idle: int  # parameters of the routed experts that a token is not sent to
    flops_by_part: dict[str, int]  # forward FLOPs per token, active experts only
    layers: tuple[dict[str, int], ...]  # parameters by part of each layer; not embedding, head, final norm

    @property
    def total(self) -> int:
        """All parameters; a tied embedding counts once."""
        return sum(self.by_part.values())

    @property
    def active_all(self) -> int:
        """Parameters that one token uses, both embeddings included."""
        return self.total - self.idle

    @property
    def active_no_input_emb(self) -> int:
        """`active_all` without the input embedding. A tied embedding is then not counted at all."""
        return self.active_all - self.by_part["embedding"]

    @property
    def active_no_emb(self) -> int:
        """`active_all` without the input embedding and the output head."""
        return self.active_no_input_emb - self.by_part.get("head", 0)

    @property
    def sparsity(self) -> float:
        """`total / active_all`."""
        return self.total / self.active_all

    @property
    def flops_per_token_forward(self) -> int:
        """Forward FLOPs of one token in a sequence of `seq_len`."""
        return sum(self.flops_by_part.values())

    @property
    def flops_per_token_train(self) -> int:
        """Forward and backward FLOPs without recomputation, as used for model FLOPs utilization (MFU)."""
        return 3 * self.flops_per_token_forward

    @property
    def flops_per_token_recompute(self) -> int:
        """Forward and backward FLOPs with activation checkpointing, where every block runs forward twice.

        PyTorch may skip the last product of a recomputed dense block, because nothing needs its result.
        """
        return self.flops_per_token_train + self.flops_per_token_forward - self.flops_by_part.get("head", 0)

    def layer_kinds(self) -> list[tuple[int, dict[str, int]]]:
        """Groups of consecutive equal layers: the number of layers and the parameters of each one."""
        return [(len(list(group)), parts) for parts, group in groupby(self.layers)]

    def record(self) -> dict[str, Any]:
        """All counts as plain values for JSON."""
        layers = [{"layers": number, "each": parts} for number, parts in self.layer_kinds()]
        return {name: getattr(self, name) for name in _RECORDED} | {"layers": layers}


def count_parameters(config: Config) -> ModelCounts:
    """Count the parameters and FLOPs of a configuration.

    Raises:
        ConfigError: `config` is of another type, or its `model.vocab_size` is null.
    """
    check_type("config", config, Config)
    model, moe, seq_len = config.model, config.moe, config.data.seq_len
    layers = tuple(_count_layer(config, layer) for layer in range(model.n_layers))
    embedding = config.vocab_size * model.d_model
    outside = Counter(embedding=embedding, norms=model.d_model, head=0 if model.tie_embeddings else embedding)
    sizes = sum(map(Counter, layers), outside)
    idle = sizes["routed_experts"] * (moe.num_experts - moe.top_k) // moe.num_experts
    flops = Counter({part: 2 * size for part, size in sizes.items() if part not in ("embedding", "norms")})
    flops["head"] = 2 * embedding  # a tied head has no parameters of its own, but it multiplies
    flops["routed_experts"] -= 2 * idle
    # Scores and weighted values take 4 FLOPs per dimension of a head and key, with (S + 1) / 2 keys.
    flops["attention"] += model.n_layers * model.n_heads * 2 * model.head_dim * (seq_len + 1)
    return ModelCounts(config.run.name, seq_len, in_order(sizes), idle, in_order(flops), layers)


def in_order(numbers: Mapping[str, int]) -> dict[str, int]:
    """The numbers other than 0, in the order of `PARTS`."""
    return {part: numbers[part] for part in PARTS if numbers.get(part)}


def _router_size(d_model: int, moe: MoEConfig) -> int:
    """Parameters of a router. One of your own is built, on the meta device, to be counted."""
    if ":" not in moe.router:
        return {"hash": 0, "noisy_topk": 2}.get(moe.router, 1) * d_model * moe.num_experts
    from moe.model.router_rules import count_router  # with torch, which other counts do without

    return count_router(d_model, moe)


def _count_layer(config: Config, layer: int) -> dict[str, int]:
    model, moe = config.model, config.moe
    expert = 3 * model.d_model * moe.d_ff_expert
    heads = 2 * model.n_heads + 2 * model.n_kv_heads  # query, key, value, output
    norms = 2 * model.d_model
    if model.qk_norm:
        norms += (2 if model.qk_norm_scope == "head" else model.n_heads + model.n_kv_heads) * model.head_dim
    parts = {"attention": heads * model.d_model * model.head_dim, "norms": norms}
    if layer not in config.moe_layers:
        return parts | {"dense_blocks": 3 * model.d_model * model.d_ff}
    if moe.is_dense:
        return parts | {"dense_blocks": (1 + moe.num_shared_experts) * expert}
    return parts | {
        "router": _router_size(model.d_model, moe),
        "routed_experts": moe.num_experts * expert,
        "shared_experts": moe.num_shared_experts * expert + moe.shared_expert_gate * model.d_model,
    }
