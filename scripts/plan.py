"""What a budget buys: the compute-optimal dense model, and sparse ones of the same active size.

python scripts/plan.py --budget-usd 20000 --gpu h100 --gpus 64
python scripts/plan.py --budget-flops 1e21 --gpu a100 --gpus 32 --experts 16,64
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.accounting.cost import GPU, GPUS, HOUR, known_gpu, projected_cost
from moe.accounting.counts import count
from moe.accounting.memory import USABLE, placements
from moe.accounting.scaling_laws import (
    CHINCHILLA_PARAMS,
    CHINCHILLA_TOKENS,
    CLARK_EXPERTS,
    CLARK_PARAMS,
    chinchilla_loss,
    compute_optimal,
    effective_params,
)
from moe.config.loading import OneLineParser, fraction, parse_config, positive, positive_int
from moe.config.schema import Config, ConfigError, CostConfig
from moe.tables import align, gib, short

# Tokens/s of a sparse model over those of a dense one of equal active FLOPs: OLMoE on H100 (23,600 / 37,500;
# Muennighoff et al. 2024) and Switch-Base on TPU (1,000 / 1,600; Fedus et al. 2021).
SPARSE_SPEED = 0.63
TOP_K = 2
BATCH_TOKENS = 2**20
WIDEST = 8192


def main(arguments: list[str]) -> int:
    """Parse the command line, plan, print."""
    parser = OneLineParser(
        prog="plan.py",
        description="What a budget buys: a compute-optimal dense model, sparse ones of its active size.",
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--budget-flops", type=positive, help="FLOPs of the model's training")
    budget.add_argument("--budget-usd", type=positive, help="price of the GPU-hours")
    names = ", ".join(gpu.name for gpu in GPUS)
    parser.add_argument("--gpu", type=known_gpu, required=True, help=f"one of {names}")
    parser.add_argument("--gpus", type=positive_int, required=True, help="how many")
    parser.add_argument("--experts", default="8,16,32,64,128", help="default 8,16,32,64,128")
    parser.add_argument("--mfu", type=fraction, default=0.4, help="utilisation, dense (default 0.4)")
    parser.add_argument(
        "--sparse-speed",
        type=fraction,
        default=SPARSE_SPEED,
        help=f"tokens/s of a sparse model over a dense one's at equal active FLOPs (default {SPARSE_SPEED})",
    )
    parser.add_argument("--usd-per-hour", type=positive, help="price of a GPU (default: a common one)")
    parser.add_argument("--vocab-size", type=positive_int, default=50304, help="default 50304")
    parser.add_argument("--seq-len", type=positive_int, default=4096, help="per sample (default 4096)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        rates = CostConfig(usd_per_hour=options.usd_per_hour)
        counts = expert_counts(options.experts)
        flops = options.budget_flops or flops_for(options.budget_usd, options.mfu, options.gpu, rates)
        option = "--budget-flops" if options.budget_flops else "--budget-usd"
        dense_size, dense_tokens = compute_optimal(flops)
        if dense_size < CHINCHILLA_PARAMS[0]:
            raise ConfigError(
                option,
                f"is too small to plan: {flops:.2g} FLOPs ask for {short(dense_size)} parameters; the laws "
                f"were fitted from {short(CHINCHILLA_PARAMS[0])} on; raise it, or measure with train.py",
            )
        if dense_size > 2 * count(_shape(WIDEST, 1, options)).active_no_input_emb:
            raise ConfigError(
                option,
                f"asks for a model of {short(dense_size)} parameters, beyond any law; lower it",
            )
        rows = [plan(flops, dense_size, experts, rates, options) for experts in (1, *counts)]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(
        f"{flops:.3g} FLOPs: a dense model does best with {short(dense_size)} parameters "
        f"and {short(dense_tokens)} tokens"
    )
    print(align(list(table(rows))))
    print("\n".join(notes(rows, options)))
    return 0


def expert_counts(text: str) -> list[int]:
    """The argument of --experts."""
    counts = [int(part) for part in text.split(",") if part.isdecimal() and int(part) > TOP_K]
    if len(counts) != len(text.split(",")):
        raise ConfigError("--experts", f"should be numbers above {TOP_K} such as 8,64, got {text!r}")
    return counts


def flops_for(usd: float, mfu: float, gpu: GPU, rates: CostConfig) -> float:
    """FLOPs that so much money buys at a utilisation."""
    price = gpu.usd_per_hour if rates.usd_per_hour is None else rates.usd_per_hour
    if not price:
        raise ConfigError("--usd-per-hour", f"no price of the {gpu.name} is known here; give one")
    return usd / price * HOUR * gpu.peak_flops * mfu


def plan(
    flops: float, size: float, experts: int, rates: CostConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """One row: the shape nearest to `size` active parameters, its tokens, its loss, its cost, its place.

    With money as the budget, a slower model gets fewer FLOPs.
    """
    gpu: GPU = options.gpu
    config = shape(size, experts, options)
    ledger, place = count(config), placements(config, options.gpus, gpu.memory)[0]
    mfu = options.mfu * (1 if experts == 1 else options.sparse_speed)
    if place.activation_checkpointing:
        mfu *= ledger.flops_per_token_train / ledger.flops_per_token_recompute
    if options.budget_usd is not None:
        flops = flops_for(options.budget_usd, mfu, gpu, rates)
    tokens = flops / ledger.flops_per_token_train
    effective = effective_params(ledger.active_no_input_emb, experts)
    return {
        "experts": experts,
        "model": config.model_dump(mode="json")["model"],
        "moe": config.model_dump(mode="json")["moe"],
        "total": ledger.total,
        "active_no_input_emb": ledger.active_no_input_emb,
        "tokens": tokens,
        "effective_params": effective,
        "loss": chinchilla_loss(effective, tokens),
        "outside_range": list(outside(ledger.active_no_input_emb, experts, effective, tokens)),
        "mfu": mfu,
        "cost": asdict(projected_cost(flops, mfu, gpu, rates)),
        "placement": place.record(),
    }


def outside(active: float, experts: int, effective: float, tokens: float) -> Iterator[str]:
    """What a row leaves of the ranges in which the laws were fitted."""
    if not CHINCHILLA_TOKENS[0] <= tokens <= CHINCHILLA_TOKENS[1]:
        yield f"{short(tokens)} tokens"
    if effective > CHINCHILLA_PARAMS[1]:
        yield f"{short(effective)} effective parameters"
    if experts > 1 and active > CLARK_PARAMS[1]:
        yield f"{short(active)} active parameters"
    if experts > CLARK_EXPERTS:
        yield f"{experts} experts"


def shape(size: float, experts: int, options: argparse.Namespace) -> Config:
    """A decoder of about so many active parameters: 128 times as wide as deep, heads of 128, SwiGLU of 8/3 d.

    Sparse ones have experts of half that width, two per token: equal active FLOPs but for the router.
    """
    candidates = [_shape(width, experts, options) for width in range(256, WIDEST + 1, 128)]
    return min(candidates, key=lambda config: abs(count(config).active_no_input_emb - size))


def _shape(width: int, experts: int, options: argparse.Namespace) -> Config:
    hidden = round(8 * width / 3 / 128) * 128
    per_gpu = max(1, round(BATCH_TOKENS / options.seq_len / options.gpus))
    sparse = {"num_experts": experts, "top_k": TOP_K, "d_ff_expert": hidden // TOP_K}
    dense = {"num_experts": 1, "top_k": 1, "d_ff_expert": hidden}
    return parse_config(
        {
            "run": {"name": "dense" if experts == 1 else f"{experts}-experts"},
            "model": {
                "d_model": width,
                "n_layers": width // 128,
                "n_heads": width // 128,
                "d_ff": hidden,
                "max_seq_len": options.seq_len,
                "tie_embeddings": False,
                "vocab_size": options.vocab_size,
            },
            "moe": dense if experts == 1 else sparse,
            "data": {"seq_len": options.seq_len},
            "train": {"micro_batch_size": 1, "global_batch_size": per_gpu * options.gpus},
            "parallel": {"precision": "bf16"},
        }
    )


def table(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row per model."""
    yield ["", "", "", "", "effective", "predicted", "", "", "", "", "peak of", "", "", "", ""]
    head = ["experts", "total", "active", "tokens", "parameters", "loss", "GPU-hours", "USD", "MWh", "tCO2e"]
    yield [*head, "a GPU", "fits", "ep_size", "ZeRO", "recompute"]
    for row in rows:
        cost, place = row["cost"], row["placement"]
        far = "*" if row["outside_range"] else ""
        yield [
            "dense" if row["experts"] == 1 else str(row["experts"]),
            short(row["total"]),
            short(row["active_no_input_emb"]),
            short(row["tokens"]),
            short(row["effective_params"]),
            f"{row['loss']:.3f}" + far,
            f"{cost['device_hours']:,.0f}",
            "?" if cost["usd"] is None else f"{cost['usd']:,.0f}",
            f"{cost['kwh'] / 1000:,.3g}",
            f"{cost['tco2e']:,.3g}",
            gib(place["memory"]["peak"]),
            "yes" if place["fits"] else "no",
            str(place["ep_size"]),
            str(place["zero_stage"]),
            "yes" if place["activation_checkpointing"] else "no",
        ]


def notes(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
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
        f"Tokens: the budget over FLOPs per token, attention included. Time: {options.mfu:.0%} utilisation, "
        f"for sparse models {options.sparse_speed} of that. Energy: data-sheet power, PUE 1.1, 0.429 kg/kWh."
    )
    yield (
        f"Fits: {gib(USABLE * options.gpu.memory)}, {USABLE:.0%} of a GPU, experts evenly used; recomputing "
        "takes a third more time."
    )
    for row in rows:
        if row["outside_range"]:
            name = "dense" if row["experts"] == 1 else f"{row['experts']} experts"
            yield f"* {name}: outside the range of the laws with {', '.join(row['outside_range'])}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
