"""Checks that involve several keys of the configuration, each with the key to change and the fix."""

import re
from collections.abc import Iterator

from moe.config.sections import (
    ROUTER_RULES,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)

Conflict = tuple[str, str]  # the dotted key to change; what is wrong, and the fix
MOST_SOURCES = 32  # of a mixture: with more, the rounding in data/mixture.py could exceed the largest share


def model_conflicts(model: ModelConfig, data: DataConfig) -> Iterator[Conflict]:
    """Widths that do not divide, and samples that are too long."""
    if "head_dim" not in model.model_fields_set and model.d_model % model.n_heads:
        fix = "choose a divisor or set model.head_dim"
        yield "model.n_heads", f"{model.n_heads} does not divide model.d_model ({model.d_model}); {fix}"
    if model.head_dim % 2:
        yield "model.head_dim", f"rotary positions need an even width, got {model.head_dim}; use an even one"
    if model.n_heads % model.n_kv_heads:
        problem = f"{model.n_kv_heads} does not divide model.n_heads ({model.n_heads})"
        yield "model.n_kv_heads", f"{problem}; choose a divisor"
    if data.seq_len > model.max_seq_len:
        given = str(data.seq_len) if "seq_len" in data.model_fields_set else f"{data.seq_len}, the default,"
        problem = f"{given} is longer than model.max_seq_len ({model.max_seq_len})"
        yield "data.seq_len", f"{problem}; lower data.seq_len or raise model.max_seq_len"


def data_conflicts(data: DataConfig) -> Iterator[Conflict]:
    """Encodings that Python does not know, and validation text that is missing or has no usable name."""
    try:
        " ".encode(data.encoding)
    except (LookupError, ValueError):  # unknown, or a codec that is not for text, such as hex
        yield "data.encoding", f"{data.encoding!r} is no encoding that Python knows; give one such as utf-8"
    if data.validation is None and data.validation_share == 0:
        yield "data.validation_share", "0 leaves no text to evaluate on; raise it or set data.validation"
    for key, names in {"data.extra_validation": data.extra_validation, "data.sources": data.sources}.items():
        for name in names:
            taken = ("train", "validation", "loss", "bits_per_byte")
            if not re.fullmatch(r"[\w-]+", name) or name in taken:
                fix = f"use letters, digits, _ and -, but not {', '.join(taken)}"
                yield key, f"{name!r} cannot name a text; {fix}"
    if data.shuffle_buffer and not data.streaming:
        yield "data.shuffle_buffer", "is for streams; other text is shuffled as a whole; remove it"
    yield from _mixture_conflicts(data)


def _mixture_conflicts(data: DataConfig) -> Iterator[Conflict]:
    """Keys of one source beside several, and of several beside one."""
    if not data.sources:
        for key, value in {
            "anneal_step": data.anneal_step,
            "source_revisions": data.source_revisions,
        }.items():
            if value:
                yield f"data.{key}", "is of data.sources, and there are none; remove it"
        return
    for key in ("source", "subset", "revision"):
        if getattr(data, key) != DataConfig.model_fields[key].default:
            yield f"data.{key}", "has no meaning beside data.sources; remove it, or make it one of them"
    if len(data.sources) > MOST_SOURCES:
        yield "data.sources", f"there are {len(data.sources)}, at most {MOST_SOURCES} can be mixed; join some"
    for name in data.sources.keys() & data.extra_validation.keys():
        yield "data.extra_validation", f"{name!r} is one of data.sources as well; choose another name"
    for name in data.source_revisions.keys() - data.sources.keys():
        yield "data.source_revisions", f"{name!r} is not one of data.sources; remove it"
    annealed = [source for source in data.sources.values() if source.anneal_weight is not None]
    if bool(annealed) != (data.anneal_step is not None):
        problem = "needs a source with an anneal_weight, and such a source needs this step"
        yield "data.anneal_step", f"{problem}; set both or neither"
    if data.anneal_step and not any(data.weights_at(data.anneal_step).values()):
        yield "data.sources", "no source has a weight above 0 after data.anneal_step; raise an anneal_weight"


def expert_conflicts(model: ModelConfig, moe: MoEConfig, parallel: ParallelConfig) -> Iterator[Conflict]:
    """Routing that cannot work or cannot learn, and experts that cannot be split."""
    if moe.top_k > moe.num_experts:
        problem = f"{moe.top_k} is more than moe.num_experts ({moe.num_experts})"
        yield "moe.top_k", f"{problem}; lower it or add experts"
    if moe.top_k == 1 and moe.num_experts > 1 and moe.normalize_gate_weights and moe.normalizes:
        problem = "with moe.top_k=1 every gate weight would be 1 and the router would never learn"
        yield "moe.normalize_gate_weights", f"{problem}; set it to false"
    if not moe.is_dense and not moe.layers(model.n_layers):
        problem = f"no MoE layer is left among model.n_layers={model.n_layers}"
        fix = "lower one of the two"
        yield "moe.first_dense_layers", f"{problem} with moe.every_n_layers={moe.every_n_layers}; {fix}"
    if not moe.is_dense:
        yield from _router_conflicts(moe)
    if moe.num_experts % parallel.ep_size:
        problem = f"{parallel.ep_size} does not divide moe.num_experts ({moe.num_experts})"
        yield "parallel.ep_size", f"{problem}; use a divisor"


def _router_conflicts(moe: MoEConfig) -> Iterator[Conflict]:
    """Rules that do not exist, or whose keys do not go together."""
    rule, own = moe.router, ":" in moe.router
    if not own and rule not in ROUTER_RULES:
        fix = f"use {', '.join(ROUTER_RULES)}, or MODULE:CLASS"
        yield "moe.router", f"there is no rule {rule!r}; {fix}"
    if rule == "switch" and moe.top_k != 1:
        yield "moe.top_k", f"moe.router=switch takes one expert, not {moe.top_k}; set it to 1, or use topk"
    if rule == "noisy_topk" and moe.top_k == 1:
        problem = (
            "with moe.router=noisy_topk the only gate weight would be 1 and the router would never learn"
        )
        yield "moe.top_k", f"{problem}; raise it"
    if rule == "expert_choice" and not moe.allow_causal_leak:
        problem = "expert_choice chooses tokens by comparing them with later ones, which leaks the future"
        yield "moe.router", f"{problem}; use another, or set moe.allow_causal_leak=true"
    if rule == "expert_choice" and moe.capacity_factor is not None:
        yield "moe.capacity_factor", "expert_choice fills every expert exactly; set it to null"
    if moe.bias_update_rate and rule in ("expert_choice", "hash", "uniform"):
        yield "moe.bias_update_rate", f"{rule} chooses no experts by their scores; set it to 0"
    if moe.shared_expert_gate and not moe.num_shared_experts:
        yield (
            "moe.shared_expert_gate",
            "is for shared experts; set moe.num_shared_experts, or set it to false",
        )
    yield from _group_conflicts(moe)


def _group_conflicts(moe: MoEConfig) -> Iterator[Conflict]:
    groups, best = moe.num_groups, moe.top_groups
    if moe.router != "group_limited":
        for key, value in {"num_groups": groups, "top_groups": best}.items():
            if value is not None and ":" not in moe.router:
                yield f"moe.{key}", f"is for moe.router=group_limited, not {moe.router}; set it to null"
    elif groups is None or best is None:
        missing = "num_groups" if groups is None else "top_groups"
        yield f"moe.{missing}", "moe.router=group_limited needs it; set it"
    elif moe.num_experts % groups:
        yield "moe.num_groups", f"{groups} does not divide moe.num_experts ({moe.num_experts}); use a divisor"
    elif best > groups:
        yield "moe.top_groups", f"{best} is more than moe.num_groups ({groups}); lower it"
    elif moe.top_k > best * (moe.num_experts // groups):
        experts = best * (moe.num_experts // groups)
        yield "moe.top_groups", f"{best} groups have {experts} experts, fewer than moe.top_k; raise it"


def training_conflicts(
    train: TrainConfig, optim: OptimConfig, parallel: ParallelConfig
) -> Iterator[Conflict]:
    """Batches that do not divide, and schedules that do not fit."""
    if train.global_batch_size % train.micro_batch_size:
        problem = f"{train.micro_batch_size} does not divide train.global_batch_size"
        yield "train.micro_batch_size", f"{problem} ({train.global_batch_size}); choose a divisor"
    if optim.warmup_steps is not None and optim.warmup_steps > train.steps:
        problem = f"{optim.warmup_steps} is more than train.steps ({train.steps})"
        yield "optim.warmup_steps", f"{problem}; lower it, or use null"
    for beta in optim.betas:
        if not 0 <= beta < 1:
            yield "optim.betas", f"each must be at least 0 and less than 1, got {beta}; lower it"
