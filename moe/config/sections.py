"""Every key of the configuration, with its default and its meaning.

A dotted key such as `moe.num_experts` is the field `num_experts` of the section `moe`.
"""

from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

# What happens when a resumed run changes a key. `refused`: it would be a different experiment. `free`: no
# result depends on the key. `extends`: allowed, but a finished run with another value is a different result.
OnResume = Literal["refused", "free", "extends"]
_T = TypeVar("_T")
_Free = Annotated[_T, "free"]
_Extends = Annotated[_T, "extends"]


class Section(BaseModel):
    """A part of the configuration: frozen, strict, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    on_resume: ClassVar[OnResume] = "refused"  # of the keys that do not say otherwise


class RunConfig(Section):
    """Where a run lives and how it starts."""

    name: _Free[str] = Field(default="run", min_length=1, pattern=r"^[\w.-]+$", description="name of the run")
    dir: _Free[str] = Field(
        default_factory=lambda data: f"runs/{data['name']}",
        min_length=1,
        description="folder of the run; default runs/NAME",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the initial weights and of the sample order"
    )
    resume: _Free[Literal["auto", "never", "must"]] = Field(
        default="auto",
        description="auto: continue if there is a checkpoint; never: refuse a used folder; must: a fresh one",
    )


class ModelConfig(Section):
    """The transformer around the experts."""

    d_model: int = Field(default=128, gt=0, multiple_of=8, description="width of the residual stream")
    n_layers: int = Field(default=4, gt=0, description="number of blocks")
    n_heads: int = Field(default=4, gt=0, description="query heads")
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
    d_ff: int = Field(default=512, gt=0, multiple_of=8, description="hidden width of the dense SwiGLU blocks")
    max_seq_len: int = Field(default=256, gt=0, description="longest context, in tokens")
    rope_theta: float = Field(default=10_000.0, gt=1, description="base of the rotary frequencies")
    tie_embeddings: bool = Field(default=True, description="share the input embedding with the output head")
    qk_norm: bool = Field(default=False, description="RMSNorm of queries and keys before rotation")
    qk_norm_scope: Literal["head", "all_heads"] = Field(
        default="head", description="what one such norm spans: a head (Qwen3), or all heads at once (OLMoE)"
    )
    vocab_size: int | None = Field(
        default=None, gt=1, description="rows of the embedding; null: from the tokenizer"
    )


class MoEConfig(Section):
    """The sparse feed-forward layers."""

    num_experts: int = Field(
        default=8, gt=0, description="experts per MoE layer; 1 with top_k 1 is the dense model"
    )
    top_k: int = Field(default=2, gt=0, description="experts per token")
    d_ff_expert: int = Field(default=512, gt=0, multiple_of=8, description="hidden width of one expert")
    num_shared_experts: int = Field(default=0, ge=0, description="experts that see every token")
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="null: dropless; else each expert takes ceil(factor * T * K / E) assignments in training",
    )
    normalize_gate_weights: bool = Field(
        default=True, description="rescale the K gate weights of a token to sum to 1"
    )
    aux_loss_coef: float = Field(default=0.01, ge=0, description="coefficient of the load-balancing loss")
    z_loss_coef: float = Field(default=0.001, ge=0, description="coefficient of the router z-loss")
    every_n_layers: int = Field(
        default=1, gt=0, description="every n-th layer after the first dense ones is sparse"
    )
    first_dense_layers: int = Field(default=0, ge=0, description="leading layers that stay dense")

    @property
    def is_dense(self) -> bool:
        """One expert for every token is a dense block: no router is built."""
        return self.num_experts == 1


class DataConfig(Section):
    """The corpus, the tokenizer and the length of a sample."""

    source: str = Field(
        default="stdlib", min_length=1, description="stdlib, a file, a folder, a glob, or a hub dataset name"
    )
    subset: str | None = Field(
        default=None, description="configuration of a hub dataset, such as wikitext-103-raw-v1"
    )
    revision: _Free[str | None] = Field(
        default=None,
        description="commit of a hub dataset; null: the newest. Pinned, a cached one needs no network",
    )
    text_field: str = Field(default="text", min_length=1, description="field that holds the text of a record")
    tokenizer: str = Field(
        default="bpe:4096",
        min_length=1,
        description="bpe:N (trained here), bytes, a tokenizer.json, or a hub name",
    )
    end_token: str | None = Field(
        default=None, description="token after each document; null: the well-known one that the tokenizer has"
    )
    seq_len: int = Field(default=256, gt=0, description="tokens per sample")
    streaming: bool = Field(
        default=False,
        description="hub datasets: read only as many documents as the run needs, in the stream's order",
    )
    cache_dir: _Free[str | None] = Field(
        default=None, description="folder of tokenized corpora; null: gatework in the user's cache folder"
    )


class TrainConfig(Section):
    """How long, how much at a time, and how often to look."""

    steps: _Extends[int] = Field(default=300, gt=0, description="optimizer steps")
    global_batch_size: int = Field(
        default=16, gt=0, description="sequences per optimizer step, over all ranks"
    )
    micro_batch_size: _Free[int] = Field(
        default=16, gt=0, description="sequences per rank per forward; accumulation is derived"
    )
    eval_interval: _Free[int] = Field(default=100, gt=0, description="steps between evaluations")
    eval_batches: int = Field(
        default=8, gt=0, description="validation batches of global_batch_size per evaluation"
    )
    checkpoint_interval: _Free[int] = Field(default=100, gt=0, description="steps between checkpoints")
    keep_checkpoints: _Free[int] = Field(default=2, gt=0, description="newest checkpoints that are kept")
    activation_checkpointing: _Free[bool] = Field(
        default=False, description="recompute each block in the backward pass"
    )
    compile: _Free[bool] = Field(
        default=False, description="torch.compile each block; needs a C++ compiler on CPU"
    )


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: float = Field(default=3e-3, gt=0, description="peak learning rate")
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="last learning rate over the peak")
    warmup_steps: int = Field(default=20, ge=0, description="steps of linear warm-up")
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="Adam's decay rates of the two moments"
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled decay of matrices; norms are never decayed"
    )
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")


class ParallelConfig(Section):
    """Device, precision and how ranks share the work."""

    on_resume: ClassVar[OnResume] = "free"

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where there is one"
    )
    ep_size: int = Field(default=1, gt=0, description="ranks that split the experts of a layer")
    dispatch: Literal["once_per_rank", "once_per_expert"] = Field(
        default="once_per_rank",
        description="how often a token travels to a rank that holds several of its experts",
    )
    overlap: bool = Field(
        default=True, description="compute the shared experts while tokens travel to the others"
    )
    zero_stage: Literal[1, 2] = Field(
        default=1,
        description="ZeRO stage; under bf16, 2 accumulates micro batches in fp32 and 1 in bf16 "
        "(0 clips expert gradients wrongly, 3 does not take MoE layers)",
    )
    precision: _Extends[Literal["fp32", "bf16"]] = Field(
        default="fp32", description="precision of weights and activations; the router is always fp32"
    )
    timeout_s: float = Field(
        default=600.0, gt=0, le=1e6, description="seconds after which a stuck collective ends the run"
    )


class LogConfig(Section):
    """What is written down, and where."""

    on_resume: ClassVar[OnResume] = "free"

    interval: int = Field(default=10, gt=0, description="steps between lines of metrics.jsonl")
    wandb: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="mirror of metrics.jsonl"
    )
    wandb_project: str = Field(default="gatework", min_length=1, description="Weights & Biases project")


class CostConfig(Section):
    """Rates that turn hours into utilisation, money and energy."""

    on_resume: ClassVar[OnResume] = "free"

    peak_flops: float | None = Field(
        default=None, gt=0, description="peak FLOP/s of a device; null: known for common GPUs (bf16, dense)"
    )
    watts: float | None = Field(
        default=None, gt=0, description="power of a device; null: data-sheet power of common GPUs"
    )
    usd_per_hour: float | None = Field(
        default=None, ge=0, description="price of a device; null: a common price of common GPUs"
    )
    pue: float = Field(default=1.1, ge=1, description="power of the data centre over that of its devices")
    kg_co2e_per_kwh: float = Field(
        default=0.429, ge=0, description="of the electricity; default: US average (Patterson et al. 2021)"
    )
