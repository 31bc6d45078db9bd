"""The tables of `scripts/count.py`: models, their parts and layers, their cost, and where they fit."""

from collections.abc import Iterator, Sequence
from typing import Any

from moe.accounting.counts import PARTS, ModelCounts
from moe.tables import plain, short

SHOWN = 8  # placements, best first


def overview_rows(models: Sequence[ModelCounts]) -> Iterator[list[str]]:
    """A row per model."""
    yield ["", "parameters", "active", "no input", "no", "total /", "GFLOP", "GFLOP"]
    yield ["model", "total", "all", "embedding", "embeddings", "active", "forward", "training"]
    for model in models:
        counts = (model.total, model.active_all, model.active_no_input_emb, model.active_no_emb)
        flops = (model.flops_per_token_forward, model.flops_per_token_train)
        yield [
            model.name,
            *(f"{number:,}" for number in counts),
            f"{model.sparsity:.2f}",
            *(f"{number / 1e9:,.4g}" for number in flops),
        ]


def part_rows(model: ModelCounts) -> Iterator[list[str]]:
    """Parameters and forward FLOPs by part."""
    yield ["part", "parameters", "share", f"FLOPs per token, {model.seq_len} tokens", "share"]
    for part in PARTS:
        size, flops = model.by_part.get(part, 0), model.flops_by_part.get(part, 0)
        if size or flops:
            shares = (size / model.total, flops / model.flops_per_token_forward)
            yield [part, f"{size:,}", f"{shares[0]:.1%}", f"{flops:,}", f"{shares[1]:.1%}"]
    yield ["all", f"{model.total:,}", "", f"{model.flops_per_token_forward:,}", ""]
    yield ["training", "", "", f"{model.flops_per_token_train:,}", ""]
    yield ["training with recomputation", "", "", f"{model.flops_per_token_recompute:,}", ""]


def layer_lines(model: ModelCounts) -> Iterator[str]:
    """The parameters of each layer, where layers differ."""
    kinds, first = model.layer_kinds(), 0
    for number, parts in kinds if len(kinds) > 1 else []:
        name = f"layer {first}" if number == 1 else f"layers {first} to {first + number - 1}, each"
        sizes = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
        yield f"{name}: {sum(parts.values()):,} = {sizes}"
        first += number


def cost_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Time, money and energy, of a record as `scripts/count.py --json` prints it."""
    cost = record["cost"]
    yield ["training tokens", short(record["tokens"])]
    yield ["FLOPs of the model", f"{cost['flops']:.3g}"]
    yield [f"GPU-hours at {record['mfu']:.0%} utilisation", plain(cost["device_hours"])]
    yield ["  with recomputation", plain(cost["device_hours"] * record["recompute_factor"])]
    yield ["days", plain(cost["device_hours"] / record["gpus"] / 24)]
    yield ["hardware burden, FLOPs", f"{cost['hardware_burden_flops']:.3g}"]
    yield ["price", "unknown: set cost.usd_per_hour" if cost["usd"] is None else "$" + plain(cost["usd"])]
    yield ["electricity", plain(cost["kwh"]) + " kWh"]
    yield ["emissions", plain(cost["tco2e"]) + " tCO2e"]


def placement_rows(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """The configuration's own placement and the best ones; what a GPU holds and sends in a step, in GiB."""
    parts = [part for part in found[0]["memory"] if part != "peak"]
    yield ["", "fits", "ep_size", "ZeRO", "recompute", "peak", *parts, "sent"]
    own = [place for place in found if place["yours"]]
    for place in [*own, *(place for place in found[:SHOWN] if not place["yours"])]:
        sizes = [place["memory"][part] for part in ("peak", *parts)] + [place["communication"]["total"]]
        yield [
            "config" if place["yours"] else "",
            "yes" if place["fits"] else "no",
            *(str(place["ep_size"]), str(place["zero_stage"])),
            "yes" if place["activation_checkpointing"] else "no",
            *(f"{size / 2**30:,.2f}" for size in sizes),
        ]
