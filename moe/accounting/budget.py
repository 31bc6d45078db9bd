"""What a budget buys: the compute-optimal dense model, and sparse ones of the same active size."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moe.accounting.cost import HOUR, projected_cost
from moe.accounting.counts import count_parameters
from moe.accounting.gpus import GPU
from moe.accounting.placement import USABLE, placements
from moe.accounting.scaling_laws import (
    CHINCHILLA_PARAMS,
    CHINCHILLA_TOKENS,
    CLARK_EXPERTS,
    CLARK_PARAMS,
    chinchilla_loss,
    compute_optimal,
    effective_params,
)
from moe.config import Config, ConfigError, CostConfig, parse_config
from moe.tables import gib, short

# Tokens/s of a sparse model over those of a dense one of equal active FLOPs: OLMoE on H100 (23,600 / 37,500;
# Muennighoff et al. 2024) and Switch-Base on TPU (1,000 / 1,600; Fedus et al. 2021).
SPARSE_SPEED = 0.63
TOP_K = 2
BATCH_TOKENS = 2**20
WIDEST = 8192


@dataclass(frozen=True)
class Budget:
    """What may be spent, and on what.

    Attributes:
        flops: of the model's training; None: `usd` says how many.
        usd: price of the GPU-hours; None: `flops` is the budget.
        gpu: the GPUs.
        gpus: how many.
        mfu: utilisation of a dense model.
        sparse_speed: tokens/s of a sparse model over a dense one's at equal active FLOPs.
        usd_per_hour: price of a GPU; None: a common one.
        vocab_size: of the models.
        seq_len: tokens per sample.
    """

    flops: float | None
    usd: float | None
    gpu: GPU
    gpus: int
    mfu: float = 0.4
    sparse_speed: float = SPARSE_SPEED
    usd_per_hour: float | None = None
    vocab_size: int = 50304
    seq_len: int = 4096

    @property
    def rates(self) -> CostConfig:
        """The section `cost` of a configuration."""
        return CostConfig(usd_per_hour=self.usd_per_hour)

    def flops_at(self, mfu: float) -> float:
        """FLOPs that it buys at a utilisation.

        Raises:
            ConfigError: the price of the GPU is not known.
        """
        if self.flops is not None or self.usd is None:
            return self.flops or 0.0
        price = self.gpu.usd_per_hour if self.usd_per_hour is None else self.usd_per_hour
        if not price:
            raise ConfigError("--usd-per-hour", f"no price of the {self.gpu.name} is known here; give one")
        return self.usd / price * HOUR * self.gpu.peak_flops * mfu

    def dense_optimum(self) -> tuple[float, float]:
        """Parameters and tokens of the compute-optimal dense model.

        Raises:
            ConfigError: the scaling laws say nothing of a model of that size.
        """
        option, flops = "--budget-usd" if self.flops is None else "--budget-flops", self.flops_at(self.mfu)
        size, tokens = compute_optimal(flops)
        if size < CHINCHILLA_PARAMS[0]:
            raise ConfigError(
                option,
                f"is too small to plan: {flops:.2g} FLOPs ask for {short(size)} parameters; the laws "
                f"were fitted from {short(CHINCHILLA_PARAMS[0])} on; raise it, or measure with train.py",
            )
        if size > 2 * count_parameters(self._shape(WIDEST, 1)).active_no_input_emb:
            raise ConfigError(
                option, f"asks for a model of {short(size)} parameters, beyond any law; lower it"
            )
        return size, tokens

    def model(self, size: float, experts: int) -> dict[str, Any]:
        """The shape nearest to `size` active parameters, its tokens, its loss, its cost and its placement.

        With money as the budget, a slower model gets fewer FLOPs.
        """
        candidates = [self._shape(width, experts) for width in range(256, WIDEST + 1, 128)]
        config = min(candidates, key=lambda one: abs(count_parameters(one).active_no_input_emb - size))
        counts, place = count_parameters(config), placements(config, self.gpus, self.gpu.memory)[0]
        mfu = self.mfu * (1 if experts == 1 else self.sparse_speed)
        if place.activation_checkpointing:
            mfu *= counts.flops_per_token_train / counts.flops_per_token_recompute
        flops = self.flops_at(mfu)
        tokens = flops / counts.flops_per_token_train
        effective = effective_params(counts.active_no_input_emb, experts)
        return {
            "experts": experts,
            "model": config.model_dump(mode="json")["model"],
            "moe": config.model_dump(mode="json")["moe"],
            "total": counts.total,
            "active_no_input_emb": counts.active_no_input_emb,
            "tokens": tokens,
            "effective_params": effective,
            "loss": chinchilla_loss(effective, tokens),
            "outside_range": list(_outside(counts.active_no_input_emb, experts, effective, tokens)),
            "mfu": mfu,
            "cost": asdict(projected_cost(flops, mfu, self.gpu, self.rates)),
            "placement": place.record(),
        }

    def _shape(self, width: int, experts: int) -> Config:
        """A decoder: 128 times as wide as deep, heads of 128, SwiGLU of 8/3 of the width.

        Sparse ones have experts of half that width, two per token: equal active FLOPs but for the router.
        """
        hidden = round(8 * width / 3 / 128) * 128
        per_gpu = max(1, round(BATCH_TOKENS / self.seq_len / self.gpus))
        sparse = {"num_experts": experts, "top_k": TOP_K, "d_ff_expert": hidden // TOP_K}
        dense = {"num_experts": 1, "top_k": 1, "d_ff_expert": hidden}
        model = {"d_model": width, "n_layers": width // 128, "n_heads": width // 128, "d_ff": hidden}
        model |= {"max_seq_len": self.seq_len, "tie_embeddings": False, "vocab_size": self.vocab_size}
        return parse_config(
            {
                "run": {"name": "dense" if experts == 1 else f"{experts}-experts"},
                "model": model,
                "moe": dense if experts == 1 else sparse,
                "data": {"seq_len": self.seq_len},
                "train": {"micro_batch_size": 1, "global_batch_size": per_gpu * self.gpus},
                "parallel": {"precision": "bf16"},
            }
        )


def _outside(active: float, experts: int, effective: float, tokens: float) -> Iterator[str]:
    """What a model leaves of the ranges in which the laws were fitted."""
    if not CHINCHILLA_TOKENS[0] <= tokens <= CHINCHILLA_TOKENS[1]:
        yield f"{short(tokens)} tokens"
    if effective > CHINCHILLA_PARAMS[1]:
        yield f"{short(effective)} effective parameters"
    if experts > 1 and active > CLARK_PARAMS[1]:
        yield f"{short(active)} active parameters"
    if experts > CLARK_EXPERTS:
        yield f"{experts} experts"


def budget_rows(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row per model."""
    yield ["", "", "", "", "effective", "predicted", "", "", "", "", "peak of", "", "", "", ""]
    head = ["experts", "total", "active", "tokens", "parameters", "loss", "GPU-hours", "USD", "MWh", "tCO2e"]
    yield [*head, "a GPU", "fits", "ep_size", "ZeRO", "recompute"]
    for model in models:
        cost, place = model["cost"], model["placement"]
        yield [
            "dense" if model["experts"] == 1 else str(model["experts"]),
            *(short(model[key]) for key in ("total", "active_no_input_emb", "tokens", "effective_params")),
            f"{model['loss']:.3f}" + ("*" if model["outside_range"] else ""),
            f"{cost['device_hours']:,.0f}",
            "?" if cost["usd"] is None else f"{cost['usd']:,.0f}",
            f"{cost['kwh'] / 1000:,.3g}",
            f"{cost['tco2e']:,.3g}",
            gib(place["memory"]["peak"]),
            "yes" if place["fits"] else "no",
            *(str(place["ep_size"]), str(place["zero_stage"])),
            "yes" if place["activation_checkpointing"] else "no",
        ]


def budget_notes(models: list[dict[str, Any]], budget: Budget) -> Iterator[str]:
    """What the figures rest on, and where they leave the range of the laws."""
    low, high = (short(end) for end in CHINCHILLA_PARAMS)
    tokens = [short(end) for end in CHINCHILLA_TOKENS]
    yield (
        f"Loss: Hoffmann et al. 2022, refitted by Epoch AI 2024, from runs of {low} to {high} parameters and "
        f"{tokens[0]} to {tokens[1]} tokens of MassiveText. Other text has other losses, in like order."
    )
    low, high = (short(end) for end in CLARK_PARAMS)
    yield (
        f"Effective parameters: Clark et al. 2022, S-BASE, from {low} to {high} active parameters, top-1 "
        f"of at most {CLARK_EXPERTS} experts; for top-2 of half the width, and these tokens, it is assumed."
    )
    yield (
        f"Tokens: the budget over FLOPs per token, attention included. Time: {budget.mfu:.0%} utilisation, "
        f"for sparse models {budget.sparse_speed} of that. Energy: data-sheet power, PUE 1.1, 0.429 kg/kWh."
    )
    yield (
        f"Fits: {gib(USABLE * budget.gpu.memory)}, {USABLE:.0%} of a GPU, experts evenly used; recomputing "
        "takes a third more time."
    )
    for model in models:
        if model["outside_range"]:
            name = "dense" if model["experts"] == 1 else f"{model['experts']} experts"
            yield f"* {name}: outside the range of the laws with {', '.join(model['outside_range'])}"
