"""The configuration: frozen pydantic models, their defaults and every check that needs no file and no torch.

A dotted key such as `moe.num_experts` is the field `num_experts` of the section `moe`. Reading YAML and
command-line overrides is the job of `config_io.py`.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """The user's input is wrong. The message is one line: the dotted key, what is wrong, and the fix."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}")
        self.key = key


def _refuse(key: str, message: str) -> PydanticCustomError:
    """An error of a cross-field check, carrying the dotted key that the user should change."""
    return PydanticCustomError("cross_field", "{problem}", {"problem": str(ConfigError(key, message))})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunConfig(_Section):
    """Where a run lives and how it starts."""

    name: str = Field(default="run", min_length=1, pattern=r"^[\w.-]+$", description="name of the run")
    dir: str = Field(
        default_factory=lambda data: f"runs/{data['name']}",
        min_length=1,
        description="folder of the run; default runs/<name>",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the initial weights and of the sample order"
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: continue if there is a checkpoint; never: refuse a used folder; must: a fresh one",
    )


class ModelConfig(_Section):
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


class MoEConfig(_Section):
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


class DataConfig(_Section):
    """The corpus, the tokenizer and the length of a sample."""

    source: str = Field(
        default="stdlib", min_length=1, description="stdlib, a file, a folder, a glob, or a hub dataset name"
    )
    subset: str | None = Field(
        default=None, description="configuration of a hub dataset, such as wikitext-103-raw-v1"
    )
    revision: str | None = Field(
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
    cache_dir: str | None = Field(
        default=None, description="folder of tokenized corpora; null: gatework in the user's cache folder"
    )


class TrainConfig(_Section):
    """How long, how much at a time, and how often to look."""

    steps: int = Field(default=300, gt=0, description="optimizer steps")
    global_batch_size: int = Field(
        default=16, gt=0, description="sequences per optimizer step, over all ranks"
    )
    micro_batch_size: int = Field(
        default=16, gt=0, description="sequences per rank per forward; accumulation is derived"
    )
    eval_interval: int = Field(default=100, gt=0, description="steps between evaluations")
    eval_batches: int = Field(
        default=8, gt=0, description="validation batches of global_batch_size per evaluation"
    )
    checkpoint_interval: int = Field(default=100, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, gt=0, description="newest checkpoints that are kept")
    activation_checkpointing: bool = Field(
        default=False, description="recompute each block in the backward pass"
    )
    compile: bool = Field(default=False, description="torch.compile each block; needs a C++ compiler on CPU")


class OptimConfig(_Section):
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


class ParallelConfig(_Section):
    """Device, precision and how ranks share the work."""

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
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="precision of weights and activations; the router is always fp32"
    )
    timeout_s: float = Field(
        default=600.0, gt=0, le=1e6, description="seconds after which a stuck collective ends the run"
    )


class LogConfig(_Section):
    """What is written down, and where."""

    interval: int = Field(default=10, gt=0, description="steps between lines of metrics.jsonl")
    wandb: Literal["disabled", "offline", "online"] = Field(
        default="disabled", description="mirror of metrics.jsonl"
    )
    wandb_project: str = Field(default="gatework", min_length=1, description="Weights & Biases project")


class CostConfig(_Section):
    """Rates that turn hours into utilisation, money and energy."""

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


class Config(_Section):
    """One run, complete: every section with every default filled in."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    cost: CostConfig = CostConfig()

    @model_validator(mode="after")
    def _check_across_fields(self) -> Self:
        model, moe, train = self.model, self.moe, self.train
        if "head_dim" not in model.model_fields_set and model.d_model % model.n_heads:
            raise _refuse(
                "model.n_heads",
                f"{model.n_heads} does not divide model.d_model ({model.d_model}); "
                "choose a divisor or set model.head_dim",
            )
        if model.head_dim % 2:
            raise _refuse("model.head_dim", f"rotary positions need an even width, got {model.head_dim}")
        if model.n_heads % model.n_kv_heads:
            raise _refuse(
                "model.n_kv_heads",
                f"{model.n_kv_heads} does not divide model.n_heads ({model.n_heads}); choose a divisor",
            )
        if self.data.seq_len > model.max_seq_len:
            raise _refuse(
                "data.seq_len",
                f"{self.data.seq_len} is longer than model.max_seq_len ({model.max_seq_len}); raise that",
            )
        if moe.top_k > moe.num_experts:
            raise _refuse(
                "moe.top_k",
                f"{moe.top_k} is more than moe.num_experts ({moe.num_experts}); lower it or add experts",
            )
        if moe.top_k == 1 and moe.num_experts > 1 and moe.normalize_gate_weights:
            raise _refuse(
                "moe.normalize_gate_weights",
                "with moe.top_k=1 every gate weight would be 1 and the router never learn; set it to false",
            )
        if not moe.is_dense and not moe_layers(model, moe):
            raise _refuse(
                "moe.first_dense_layers",
                f"no MoE layer is left among model.n_layers={model.n_layers} "
                f"with moe.every_n_layers={moe.every_n_layers}; lower one of the two",
            )
        if moe.num_experts % self.parallel.ep_size:
            raise _refuse(
                "parallel.ep_size",
                f"{self.parallel.ep_size} does not divide moe.num_experts ({moe.num_experts}); use a divisor",
            )
        if train.global_batch_size % train.micro_batch_size:
            raise _refuse(
                "train.micro_batch_size",
                f"{train.micro_batch_size} does not divide train.global_batch_size "
                f"({train.global_batch_size}); choose a divisor",
            )
        if train.compile and self.parallel.ep_size > 1:
            raise _refuse("train.compile", "does not go with parallel.ep_size > 1; set it to false")
        if self.optim.warmup_steps > train.steps:
            raise _refuse(
                "optim.warmup_steps",
                f"{self.optim.warmup_steps} is more than train.steps ({train.steps}); lower it",
            )
        for beta in self.optim.betas:
            if not 0 <= beta < 1:
                raise _refuse("optim.betas", f"each must be at least 0 and less than 1, got {beta}")
        return self

    def accumulation_steps(self, world_size: int) -> int:
        """Forwards per rank that make up one global batch.

        Raises:
            ConfigError: the global batch does not split evenly over the ranks and their micro batches.
        """
        micro, total = self.train.micro_batch_size, self.train.global_batch_size
        if total % (micro * world_size):
            fitting = next((m for m in range(micro, 0, -1) if total % (m * world_size) == 0), None)
            other_total = micro * world_size * max(1, round(total / (micro * world_size)))
            fix = f"train.micro_batch_size={fitting}" if fitting else str(other_total)
            raise ConfigError(
                "train.global_batch_size",
                f"{total} is not a multiple of train.micro_batch_size ({micro}) x {world_size} ranks; "
                f"use {fix}",
            )
        return total // (micro * world_size)

    def resolve(self, tokenizer_vocab_size: int) -> Self:
        """The same configuration with `model.vocab_size` filled in.

        Raises:
            ConfigError: `model.vocab_size` is smaller than the tokenizer's vocabulary.
        """
        vocab_size = self.model.vocab_size or tokenizer_vocab_size
        if vocab_size < tokenizer_vocab_size:
            raise ConfigError(
                "model.vocab_size",
                f"{vocab_size} is less than the tokenizer's {tokenizer_vocab_size}; raise it or use null",
            )
        model = self.model.model_copy(update={"vocab_size": vocab_size})
        return self.model_copy(update={"model": model})


def moe_layers(model: ModelConfig, moe: MoEConfig) -> list[int]:
    """Indices of the layers at MoE positions: every n-th one after the first dense layers."""
    first, n = moe.first_dense_layers, moe.every_n_layers
    return [layer for layer in range(first, model.n_layers) if (layer - first + 1) % n == 0]
