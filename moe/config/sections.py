"""Every key of the configuration, with its default and its meaning.

A dotted key such as `moe.num_experts` is the field `num_experts` of the section `moe`.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

# What happens when a resumed run changes a key. `refused`: it would be a different experiment. `free`: no
# result depends on the key. `extends`: allowed, but a finished run with another value is a different result.
OnResume = Literal["refused", "free", "extends"]
_T = TypeVar("_T")
_Free = Annotated[_T, "free"]
_Extends = Annotated[_T, "extends"]


ROUTER_RULES = (
    "topk", "sigmoid", "group_limited", "switch", "noisy_topk", "expert_choice", "hash", "uniform",
)  # fmt: skip


def _key(default: Any, description: str, **checks: Any) -> Any:
    return Field(default=default, description=description, **checks)


class Section(BaseModel):
    """A part of the configuration: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    on_resume: ClassVar[OnResume] = "refused"  # of the keys that do not say otherwise


class RunConfig(Section):
    """Where a run lives and how it starts."""

    name: _Free[str] = _key("run", "name of the run", min_length=1, pattern=r"^[\w.-]+$")
    dir: _Free[str] = Field(
        default_factory=lambda data: f"runs/{data['name']}",
        min_length=1,
        description="folder of the run; default runs/NAME",
    )
    seed: int = _key(0, "seed of the initial weights and the sample order", ge=0, lt=2**63)
    resume: _Free[Literal["auto", "never", "must"]] = _key(
        "auto", "auto: continue a run that exists; never: refuse one that exists; must: refuse a new one"
    )


class ModelConfig(Section):
    """The transformer around the experts."""

    d_model: int = _key(128, "width of the residual stream; multiples of 8 are fastest", gt=0)
    n_layers: int = _key(4, "number of blocks", gt=0)
    n_heads: int = _key(4, "query heads", gt=0)
    n_kv_heads: int = Field(
        default_factory=lambda data: data["n_heads"],
        gt=0,
        description="key and value heads, a divisor of n_heads; default n_heads",
    )
    head_dim: int = Field(
        default_factory=lambda data: data["d_model"] // data["n_heads"],
        gt=0,
        description="width of one head, even; default d_model / n_heads",
    )
    d_ff: int = _key(512, "hidden width of the dense SwiGLU blocks; multiples of 8 are fastest", gt=0)
    max_seq_len: int = _key(256, "longest context, in tokens", gt=0)
    rope_theta: float = _key(10_000.0, "base of the rotary frequencies", gt=1)
    tie_embeddings: bool = _key(True, "share the input embedding with the output head")
    dropout: float = _key(
        0.0, "share of a sublayer's output that is set to 0 in training, and of the embeddings", ge=0, lt=1
    )
    qk_norm: bool = _key(False, "RMSNorm of queries and keys before rotation")
    qk_norm_scope: Literal["head", "all_heads"] = _key("head", "what one norm spans: a head or all heads")
    vocab_size: int | None = _key(None, "rows of the embedding; null: from the tokenizer", gt=1)


class MoEConfig(Section):
    """The sparse feed-forward layers."""

    num_experts: int = _key(8, "experts per MoE layer; 1 with top_k 1 is the dense model", gt=0)
    top_k: int = _key(2, "experts per token", gt=0)
    d_ff_expert: int = _key(512, "hidden width of one expert; multiples of 8 are fastest", gt=0)
    num_shared_experts: int = _key(0, "experts that see every token", ge=0)
    shared_expert_gate: bool = _key(False, "weigh their output by a sigmoid that is learned")
    capacity_factor: float | None = _key(
        None, "null: dropless; else an expert takes at most ceil(factor * T * K / E)", gt=0
    )
    normalize_gate_weights: bool = _key(True, "rescale the K gate weights of a token to sum to 1")
    router: str = _key(
        "topk", f"rule of routing: {', '.join(ROUTER_RULES)}, or MODULE:CLASS of your own", min_length=1
    )
    route_scale: float = _key(1.0, "factor of all gate weights", gt=0)
    router_jitter: float = _key(
        0.01, "switch: in training the router's input is scaled by 1 +- this", ge=0, lt=1
    )
    num_groups: int | None = _key(None, "group_limited: groups of consecutive experts", gt=0)
    top_groups: int | None = _key(None, "group_limited: how many of them a token may use", gt=0)
    allow_causal_leak: bool = _key(False, "train with expert_choice, whose choice looks at later tokens")
    aux_loss_coef: float = _key(0.01, "coefficient of the load-balancing loss", ge=0)
    aux_loss_scope: Literal["sequence", "micro_batch", "global_batch"] = _key(
        "sequence", "tokens over which the load-balancing loss wants balance"
    )
    bias_update_rate: float = _key(
        0.0,
        "step by which a bias of each expert, for the choice only, moves against its load; 0: no bias",
        ge=0,
    )
    z_loss_coef: float = _key(0.001, "coefficient of the router z-loss", ge=0)
    every_n_layers: int = _key(1, "every n-th layer after the first dense ones is sparse", gt=0)
    first_dense_layers: int = _key(0, "leading layers that stay dense", ge=0)

    @property
    def is_dense(self) -> bool:
        """One expert for every token is a dense block: no router is built."""
        return self.num_experts == 1

    @property
    def normalizes(self) -> bool:
        """Whether the rule of routing reads `normalize_gate_weights`."""
        return self.router not in ("noisy_topk", "expert_choice", "hash")

    @property
    def is_noisy(self) -> bool:
        """Whether the rule of routing may draw random numbers in training."""
        return self.router in ("switch", "noisy_topk") or ":" in self.router

    def layers(self, n_layers: int) -> list[int]:
        """The MoE positions among `n_layers` layers: every n-th one after the first dense ones."""
        first, n = self.first_dense_layers, self.every_n_layers
        return [layer for layer in range(first, n_layers) if (layer - first + 1) % n == 0]


class SourceConfig(Section):
    """One of the sources of a mixture."""

    source: str = Field(min_length=1, description="where its text comes from, as in data.source")
    weight: float = Field(gt=0, description="its share of the samples is this over the sum of all weights")
    anneal_weight: float | None = _key(None, "its weight from data.anneal_step on; null: unchanged", ge=0)
    max_epochs: float | None = _key(None, "refuse to read it more often than this; null: no limit", gt=0)
    subset: str | None = _key(None, "as data.subset")
    text_field: str | None = _key(None, "as data.text_field; null: that", min_length=1)


class DataConfig(Section):
    """The corpus, the tokenizer and the length of a sample."""

    source: str = _key("stdlib", "stdlib, a file, a folder, a glob, or a hub dataset name", min_length=1)
    subset: str | None = _key(None, "configuration of a hub dataset, such as wikitext-103-raw-v1")
    revision: _Free[str | None] = _key(
        None, "commit of a hub dataset; null: the newest, and on resume the one that the run began with"
    )
    sources: dict[str, SourceConfig] = Field(
        default_factory=dict,
        description="several sources instead of one, {NAME: {source: ..., weight: ...}}; default none",
    )
    source_revisions: _Free[dict[str, str | None]] = Field(
        default_factory=dict, description="commits of hub datasets among them, {NAME: commit}; as revision"
    )
    anneal_step: int | None = _key(
        None, "optimizer steps after which sources take their anneal_weight; null: never", gt=0
    )
    text_field: str = _key(
        "text", "field that holds the text of a record, or its chat: a list of role and content", min_length=1
    )
    suffixes: list[str] | None = _key(
        None, "which files of a folder or glob are read, such as [.txt, .jsonl.gz]; null: of one known type"
    )
    encoding: str = _key("utf-8", "of text, JSON and CSV files", min_length=1)
    on_bad_record: Literal["error", "skip"] = _key(
        "error", "a record that is damaged or whose field is missing or null: stop, or skip and count it"
    )
    validation: str | None = _key(
        None, "where validation text comes from, as in source; null: a share of the source", min_length=1
    )
    validation_share: float = _key(
        0.05, "share of the documents of the source held out; 0 needs validation", ge=0, lt=1
    )
    extra_validation: dict[str, str] = Field(
        default_factory=dict,
        description="more validation texts, {NAME: source}, each evaluated as eval/NAME/loss; default none",
    )
    tokenizer: str = _key(
        "bpe:4096", "bpe:N (trained here), bytes, a tokenizer.json or a hub name", min_length=1
    )
    tokenizer_revision: _Free[str | None] = _key(None, "commit of a hub tokenizer; null: as for revision")
    end_token: str | None = _key(None, "token after each document; null: the one that the tokenizer has")
    seq_len: int = _key(256, "tokens per sample", gt=0)
    streaming: bool = _key(False, "of a hub dataset, read only as many documents as the run needs")
    shuffle_buffer: int = _key(0, "samples of a stream that are shuffled together; 0: in its order", ge=0)
    document_masks: bool = _key(False, "attention does not look into other documents of a sample")
    cache_dir: _Free[str | None] = _key(None, "folder of tokenized corpora; null: in the user's cache")
    cache_timeout_s: _Free[float] = _key(
        86_400.0, "seconds to wait for another process that tokenizes the same text", gt=0, le=1e7
    )

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights of `sources` for the step after `step` steps."""
        annealed = self.anneal_step is not None and step >= self.anneal_step
        return {
            name: source.anneal_weight if annealed and source.anneal_weight is not None else source.weight
            for name, source in self.sources.items()
        }


class TrainConfig(Section):
    """How long, how much at a time, and how often to look."""

    steps: _Extends[int] = _key(300, "optimizer steps", gt=0)
    global_batch_size: int = _key(16, "sequences per optimizer step, over all ranks", gt=0)
    micro_batch_size: _Free[int] = _key(
        16, "sequences per rank per forward; with moe.capacity_factor it stays on resume", gt=0
    )
    eval_interval: _Free[int] = _key(100, "steps between evaluations", gt=0)
    eval_batches: int = _key(8, "validation batches of global_batch_size per evaluation", gt=0)
    checkpoint_interval: _Free[int] = _key(100, "steps between checkpoints", gt=0)
    keep_checkpoints: _Free[int] = _key(2, "newest checkpoints that are kept", gt=0)
    activation_checkpointing: _Free[bool] = _key(False, "recompute each block in the backward pass")
    skip_steps: _Extends[list[Annotated[int, Field(gt=0)]]] = Field(
        default_factory=list,
        description="steps that are left out, such as those of bad batches; default none",
    )
    compile: _Free[bool] = _key(False, "torch.compile each block; needs a C++ compiler on CPU")


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = _key(3e-3, "peak learning rate", gt=0)
    min_lr_ratio: float = _key(0.1, "last learning rate over the peak", ge=0, le=1)
    warmup_steps: _Extends[int | None] = _key(
        None, "steps of linear warm-up; null: a twentieth of train.steps", ge=0
    )
    betas: tuple[float, float] = _key((0.9, 0.95), "Adam's decay rates of the two moments")
    weight_decay: float = _key(0.1, "decoupled decay of matrices; norms are never decayed", ge=0)
    grad_clip: float = _key(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    skip_norm_above: _Extends[float | None] = _key(
        None, "skip an update whose norm is above this many medians of the last 128; null: never", gt=1
    )
    max_skips: _Free[int] = _key(
        10, "most updates skipped in a row, because the gradient was not finite or too large", ge=0
    )


class ParallelConfig(Section):
    """Device, precision and how ranks share the work."""

    on_resume: ClassVar[OnResume] = "free"

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = _key(
        "auto", "auto: cuda if there is one, else cpu; nobody has tried xpu and mps yet"
    )
    ep_size: int = _key(1, "ranks that split the experts of a layer", gt=0)
    dispatch: Literal["once_per_rank", "once_per_expert"] = _key(
        "once_per_rank", "how often a token is sent to a rank with several of its experts"
    )
    overlap: bool = _key(True, "compute the shared experts while tokens travel to the others")
    precision: _Extends[Literal["fp32", "bf16"]] = _key(
        "fp32", "of weights and activations, not of the router"
    )
    zero_stage: Literal[1, 2] = _key(
        1, "ZeRO stage; 1 reduces gradients once a step, 2 after each micro batch and keeps only its share"
    )
    keep_freed_memory: bool = _key(
        True, "on CPU with glibc, reuse freed memory instead of giving it back to the system: faster"
    )
    timeout_s: float = _key(600.0, "seconds after which a stuck collective ends the run", gt=0, le=1e6)


class LogConfig(Section):
    """What is written down, and where."""

    on_resume: ClassVar[OnResume] = "free"

    interval: int = _key(10, "steps between lines of metrics.jsonl", gt=0)
    wandb: Literal["disabled", "offline", "online"] = _key("disabled", "mirror of metrics.jsonl")
    tensorboard: bool = _key(False, "a copy of metrics.jsonl for TensorBoard, in the run's folder")
    wandb_project: str = _key("gatework", "Weights & Biases project", min_length=1)


class CostConfig(Section):
    """Rates that turn hours into utilisation, money and energy."""

    on_resume: ClassVar[OnResume] = "free"

    peak_flops: float | None = _key(None, "peak FLOP/s of a device; null: known for common GPUs", gt=0)
    watts: float | None = _key(None, "power of a device; null: known for common GPUs", gt=0)
    usd_per_hour: float | None = _key(None, "price of a device; null: known for common GPUs", ge=0)
    pue: float = _key(1.1, "power of the data center over that of its devices", ge=1)
    kg_co2e_per_kwh: float = _key(0.429, "emissions of the electricity; default: US average", ge=0)
