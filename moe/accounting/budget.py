"""What a budget buys: the compute-optimal dense model, and sparse models with the same active parameters."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from moe.accounting import scaling_laws as laws
from moe.accounting.cost import HOUR, projected_cost
from moe.accounting.count_tables import placement_cells
from moe.accounting.counts import count_parameters
from moe.accounting.gpus import GPU
from moe.accounting.placement import USABLE, placements
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
    """A budget in FLOPs or in USD, and the hardware that it is spent on."""

    flops: float | None  # training FLOPs of the model; None if `usd` is the budget
    usd: float | None  # price of the GPU-hours; None if `flops` is the budget
    gpu: GPU
    gpus: int
    mfu: float = 0.4  # utilization of a dense model
    sparse_speed: float = SPARSE_SPEED  # tokens/s over those of a dense model of equal active FLOPs
    usd_per_hour: float | None = None  # of one GPU; None for a common price
    vocab_size: int = 50304
    seq_len: int = 4096  # tokens per sample

    def flops_at(self, mfu: float) -> float:
        """FLOPs that the budget buys at the utilization `mfu`.

        Raises:
            ConfigError: the price of the GPU is unknown.
        """
        if self.flops is not None or self.usd is None:
            return self.flops or 0.0
        price = self.gpu.usd_per_hour if self.usd_per_hour is None else self.usd_per_hour
        if not price:
            raise ConfigError("--usd-per-hour", f"no price of the {self.gpu.name} is known; give one")
        return self.usd / price * HOUR * self.gpu.peak_flops * mfu

    def dense_optimum(self) -> tuple[float, float]:
        """Parameters and tokens of the compute-optimal dense model.

        Raises:
            ConfigError: a model of that size is outside the range of the scaling laws.
        """
        option, flops = "--budget-usd" if self.flops is None else "--budget-flops", self.flops_at(self.mfu)
        size, tokens = laws.compute_optimal(flops)
        if size < laws.CHINCHILLA_PARAMS[0]:
            problem = f"is too small to plan: the optimum for {flops:.2g} FLOPs is {short(size)} parameters"
            known = f"the laws were fitted from {short(laws.CHINCHILLA_PARAMS[0])} on"
            raise ConfigError(option, f"{problem}; {known}; raise it, or measure with train.py")
        if size > 2 * count_parameters(self._shape(WIDEST, 1)).active_no_input_emb:
            problem = f"asks for a model of {short(size)} parameters, far beyond the range of the laws"
            raise ConfigError(option, f"{problem}; lower it")
        return size, tokens

    def model(self, size: float, experts: int) -> dict[str, Any]:
        """The model nearest to `size` active parameters, with its tokens, loss, cost and placement.

        If the budget is money, a slower model gets fewer FLOPs.
        """
        candidates = [self._shape(width, experts) for width in range(256, WIDEST + 1, 128)]
        config = min(candidates, key=lambda one: abs(count_parameters(one).active_no_input_emb - size))
        counts, place = count_parameters(config), placements(config, self.gpus, self.gpu.memory)[0]
        mfu = self.mfu * (1 if experts == 1 else self.sparse_speed)
        if place.activation_checkpointing:
            mfu *= counts.flops_per_token_train / counts.flops_per_token_recompute
        flops = self.flops_at(mfu)
        tokens = flops / counts.flops_per_token_train
        effective = laws.effective_params(counts.active_no_input_emb, experts)
        return {
            "experts": experts,
            **config.model_dump(mode="json", include={"model", "moe"}),
            "total": counts.total,
            "active_no_input_emb": counts.active_no_input_emb,
            "tokens": tokens,
            "effective_params": effective,
            "loss": laws.chinchilla_loss(effective, tokens),
            "outside_range": list(_outside(counts.active_no_input_emb, experts, effective, tokens)),
            "mfu": mfu,
            "cost": asdict(projected_cost(flops, mfu, self.gpu, CostConfig(usd_per_hour=self.usd_per_hour))),
            "placement": place.record(),
        }

    def _shape(self, width: int, experts: int) -> Config:
        """A decoder 128 times as wide as deep, with heads of 128 and SwiGLU blocks of 8/3 of the width.

        A sparse model has experts of half the block's width and sends each token to two of them, so that its
        active FLOPs are those of the dense model plus the router's.
        """
        hidden = round(8 * width / 3 / 128) * 128
        per_gpu = max(1, round(BATCH_TOKENS / self.seq_len / self.gpus))
        sparse = {"num_experts": experts, "top_k": TOP_K, "d_ff_expert": hidden // TOP_K}
        dense = {"num_experts": 1, "top_k": 1, "d_ff_expert": hidden}
        model = {"d_model": width, "n_layers": width // 128, "n_heads": width // 128, "d_ff": hidden}
        model |= {"max_seq_len": self.seq_len, "tie_embeddings": False, "vocab_size": self.vocab_size}
        train = {"micro_batch_size": 1, "global_batch_size": per_gpu * self.gpus}
        sections = {"model": model, "moe": dense if experts == 1 else sparse, "train": train}
        return parse_config(sections | {"data": {"seq_len": self.seq_len}, "parallel": {"precision": "bf16"}})


def _outside(active: float, experts: int, effective: float, tokens: float) -> Iterator[str]:
    """The values of a model that are outside the range in which the laws were fitted."""
    if not laws.CHINCHILLA_TOKENS[0] <= tokens <= laws.CHINCHILLA_TOKENS[1]:
        yield f"{short(tokens)} tokens"
    if effective > laws.CHINCHILLA_PARAMS[1]:
        yield f"{short(effective)} effective parameters"
    if experts > 1 and active > laws.CLARK_PARAMS[1]:
        yield f"{short(active)} active parameters"
    if experts > laws.CLARK_EXPERTS:
        yield f"{experts} experts"


def budget_rows(models: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Two rows of headings, then one row per model."""
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
            *placement_cells(place),
        ]


def budget_notes(models: list[dict[str, Any]], budget: Budget) -> Iterator[str]:
    """The assumptions behind the table, and which models are outside the range of the laws."""
    ranges = (laws.CHINCHILLA_PARAMS, laws.CHINCHILLA_TOKENS, laws.CLARK_PARAMS)
    params, tokens, active = (f"{short(low)} to {short(high)}" for low, high in ranges)
    yield (
        f"Loss: Hoffmann et al. 2022, refitted by Epoch AI 2024, from runs of {params} parameters and "
        f"{tokens} tokens of MassiveText. Losses on other text differ, but their order should be similar."
    )
    yield (
        f"Effective parameters: Clark et al. 2022, S-BASE, from {active} active parameters, top-1 of at most "
        f"{laws.CLARK_EXPERTS} experts. Assumed to hold for top-2 of half the width, and for these tokens."
    )
    yield (
        "Shape: of the widths that are multiples of 128, the one whose active parameters, without the input "
        "embedding, are nearest to the optimum. Tokens: budget over FLOPs per token, attention included."
    )
    yield (
        f"Time: {budget.mfu:.0%} utilisation, for sparse models {budget.sparse_speed} of that. Energy: "
        "data-sheet power, PUE 1.1, 0.429 kg CO2e/kWh."
    )
    yield (
        f"Fits: peak memory of at most {gib(USABLE * budget.gpu.memory)}, {USABLE:.0%} of a GPU, with tokens "
        "spread evenly over the experts. Recomputation takes a third more time."
    )
    for model in models:
        if model["outside_range"]:
            name = "dense" if model["experts"] == 1 else f"{model['experts']} experts"
            yield f"* {name}: outside the range of the laws with {', '.join(model['outside_range'])}"
