"""The tables that `scripts/count.py` prints: models, parts, layers, cost and placements."""

from collections.abc import Iterator, Sequence
from typing import Any

from moe.accounting.counts import PARTS, ModelCounts
from moe.tables import plain, short

SHOWN = 8  # placements in the table, best first


def overview_rows(models: Sequence[ModelCounts]) -> Iterator[list[str]]:
    """Two rows of headings, then one row per model."""
    yield ["", "parameters", "active", "no input", "no", "total /", "GFLOP", "GFLOP"]
    yield ["model", "total", "all", "embedding", "embeddings", "active", "forward", "training"]
    for model in models:
        counts = (model.total, model.active_all, model.active_no_input_emb, model.active_no_emb)
        sizes = [f"{n:,}" for n in counts]
        flops = [f"{n / 1e9:,.4g}" for n in (model.flops_per_token_forward, model.flops_per_token_train)]
        yield [model.name, *sizes, f"{model.sparsity:.2f}", *flops]


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
    """The parameters of each layer, if the layers differ."""
    kinds, first = model.layer_kinds(), 0
    for number, parts in kinds if len(kinds) > 1 else []:
        name = f"layer {first}" if number == 1 else f"layers {first} to {first + number - 1}, each"
        sizes = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
        yield f"{name}: {sum(parts.values()):,} = {sizes}"
        first += number


def cost_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Time, money and energy of a record in the format of `scripts/count.py --json`."""
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
    """The configuration's own placement, then the best ones: GiB that a GPU holds, and sends in a step."""
    parts = [part for part in found[0]["memory"] if part != "peak"]
    yield ["", "fits", "ep_size", "ZeRO", "recompute", "peak", *parts, "sent"]
    own = [place for place in found if place["yours"]]
    for place in [*own, *(place for place in found[:SHOWN] if not place["yours"])]:
        sizes = [place["memory"][part] for part in ("peak", *parts)] + [place["communication"]["total"]]
        in_gib = [f"{size / 2**30:,.2f}" for size in sizes]
        yield ["config" if place["yours"] else "", *placement_cells(place), *in_gib]


def placement_cells(place: dict[str, Any]) -> list[str]:
    """Cells of a placement's record: whether it fits, `ep_size`, ZeRO stage, whether it recomputes."""
    fits, recomputes = ("yes" if place[key] else "no" for key in ("fits", "activation_checkpointing"))
    return [fits, str(place["ep_size"]), str(place["zero_stage"]), recomputes]
