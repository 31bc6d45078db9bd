"""What a model is and what it costs: parameters, FLOPs, memory, time, money and energy; nothing is built.

python scripts/count.py CONFIG... [section.key=value ...] [--hf PATH]... [--json]
python scripts/count.py configs/zoo/olmoe_1b_7b.yaml --gpu h100 --gpus 8 --tokens 5e12
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.accounting.cost import GPU, GPUS, known_gpu, projected_cost
from moe.accounting.counts import PARTS, Ledger, count
from moe.accounting.memory import USABLE, Placement, placements
from moe.config.loading import OneLineParser, fraction, load_config, parse_config, positive, positive_int
from moe.config.schema import Config, ConfigError, CostConfig
from moe.data.tokenizer import with_vocabulary
from moe.tables import align, gib, plain, short

SHOWN = 8  # placements, best first


def main(arguments: list[str]) -> int:
    """Parse the command line, count, print."""
    parser = OneLineParser(
        prog="count.py",
        description="What a model is and what it costs: parameters, FLOPs, memory, time, money, energy.",
    )
    parser.add_argument(
        "items", nargs="*", metavar="CONFIG | key=value", help="YAML files; overrides for all"
    )
    parser.add_argument(
        "--hf",
        action="append",
        default=[],
        metavar="PATH",
        help="a config.json, a model folder or a hub name",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--seq-len", type=positive_int, help="tokens per sequence (default: the config's; 4096 for --hf)"
    )
    names = ", ".join(gpu.name for gpu in GPUS)
    parser.add_argument("--gpu", type=known_gpu, help=f"memory and cost on one of {names}")
    parser.add_argument("--gpus", type=positive_int, help="how many of them (default 8)")
    parser.add_argument("--tokens", type=positive, help="of the training run (default: those of the config)")
    parser.add_argument("--mfu", type=fraction, help="utilisation to assume (default 0.4)")
    options = parser.parse_intermixed_args(arguments)
    try:
        overrides = [item for item in options.items if "=" in item and not Path(item).exists()]
        paths = [Path(item) for item in options.items if item not in overrides]
        rates = cost_rates(overrides, options.hf)
        if options.seq_len:
            overrides += [f"data.seq_len={options.seq_len}", f"model.max_seq_len={options.seq_len}"]
        if not paths and not options.hf:
            raise ConfigError("CONFIG", "give a YAML file such as configs/tiny.yaml, or --hf PATH")
        if options.gpu is None and (options.gpus or options.tokens or options.mfu):
            raise ConfigError("--gpu", f"--gpus, --tokens and --mfu need it; name one of {names}")
        models: list[tuple[Ledger, Config | None]] = []
        for path in paths:
            config = with_vocabulary(load_config(path, overrides))
            named = "name" in config.run.model_fields_set
            models.append((replace(count(config), name=config.run.name if named else path.stem), config))
        if options.hf:
            from moe.accounting.huggingface import count_huggingface  # needs torch and transformers

            models += [(count_huggingface(source, options.seq_len or 4096), None) for source in options.hf]
        records = [
            ledger.record() | ({} if options.gpu is None else on_gpus(ledger, config, rates, options))
            for ledger, config in models
        ]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=1))
        return 0
    ledgers = [ledger for ledger, _ in models]
    print(align(list(overview(ledgers))))
    print("active in three conventions; GFLOP per token, at each model's sequence length")
    if len(ledgers) == 1:
        print("\n" + align(list(details(ledgers[0]))))
        for line in layer_lines(ledgers[0]):
            print(line)
    if options.gpu is not None:
        for record in records:
            print(f"\n{record['name']} on {record['gpus']} x {options.gpu.name}")
            print(align(list(cost_rows(record))))
            if found := record["placements"]:
                print(
                    f"fits {gib(USABLE * options.gpu.memory)}, {USABLE:.0%} of a GPU, experts evenly used; "
                    "best first; GiB that a GPU holds, and sends in a step"
                )
                print(align(list(placement_rows(found))))
                if len(found) > SHOWN:
                    print(f"and {len(found) - SHOWN} more: --json lists them all")
    return 0


def overview(ledgers: list[Ledger]) -> Iterator[list[str]]:
    """A row per model."""
    yield ["", "parameters", "active", "no input", "no", "total /", "GFLOP", "GFLOP"]
    yield ["model", "total", "all", "embedding", "embeddings", "active", "forward", "training"]
    for ledger in ledgers:
        counts = (ledger.total, ledger.active_all, ledger.active_no_input_emb, ledger.active_no_emb)
        flops = (ledger.flops_per_token_forward, ledger.flops_per_token_train)
        yield [
            ledger.name,
            *(f"{number:,}" for number in counts),
            f"{ledger.sparsity:.2f}",
            *(f"{number / 1e9:,.4g}" for number in flops),
        ]


def details(ledger: Ledger) -> Iterator[list[str]]:
    """Parameters and forward FLOPs by part, then the layers where they differ."""
    yield ["part", "parameters", "share", f"FLOPs per token, {ledger.seq_len} tokens", "share"]
    for part in PARTS:
        size, flops = ledger.by_part.get(part, 0), ledger.flops_by_part.get(part, 0)
        if size or flops:
            shares = (size / ledger.total, flops / ledger.flops_per_token_forward)
            yield [part, f"{size:,}", f"{shares[0]:.1%}", f"{flops:,}", f"{shares[1]:.1%}"]
    yield ["all", f"{ledger.total:,}", "", f"{ledger.flops_per_token_forward:,}", ""]
    yield ["training", "", "", f"{ledger.flops_per_token_train:,}", ""]
    yield ["training with recomputation", "", "", f"{ledger.flops_per_token_recompute:,}", ""]


def layer_lines(ledger: Ledger) -> Iterator[str]:
    """The parameters of each layer, where layers differ."""
    kinds, first = ledger.layer_kinds(), 0
    for number, parts in kinds if len(kinds) > 1 else []:
        name = f"layer {first}" if number == 1 else f"layers {first} to {first + number - 1}, each"
        sizes = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
        yield f"{name}: {sum(parts.values()):,} = {sizes}"
        first += number


def cost_rates(overrides: list[str], with_hf: bool) -> CostConfig:
    """The rates among the overrides; others have nothing to change in a model of --hf."""
    rates = [item.partition("=") for item in overrides if item.startswith("cost.")]
    if with_hf and len(rates) < len(overrides):
        raise ConfigError("--hf", "takes no overrides but cost.*; edit the model's config.json instead")
    return parse_config(
        {"cost": {key.removeprefix("cost."): yaml.safe_load(value) for key, _, value in rates}}
    ).cost


def on_gpus(
    ledger: Ledger, config: Config | None, rates: CostConfig, options: argparse.Namespace
) -> dict[str, Any]:
    """Cost of the training run, and where the configuration is ours, its topologies, best first."""
    gpu: GPU = options.gpu
    gpus, mfu, tokens, found = options.gpus or 8, options.mfu or 0.4, options.tokens, []
    if config is not None:
        rates = config.cost
        found = placements(config, gpus, gpu.memory)
        if {"steps", "global_batch_size"} <= config.train.model_fields_set:
            tokens = tokens or config.train.steps * config.train.global_batch_size * config.data.seq_len
    if tokens is None:
        raise ConfigError(
            "--tokens", f"{ledger.name} does not say how many it is trained on; give their number"
        )
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "mfu": mfu,
        "tokens": tokens,
        "cost": asdict(projected_cost(tokens * ledger.flops_per_token_train, mfu, gpu, rates)),
        "recompute_factor": ledger.flops_per_token_recompute / ledger.flops_per_token_train,
        "placements": [place.record() | {"yours": _is_own(place, config)} for place in found],
    }


def _is_own(place: Placement, config: Config | None) -> bool:
    assert config is not None
    own = (config.parallel.ep_size, config.parallel.zero_stage, config.train.activation_checkpointing)
    return own == (place.ep_size, place.zero_stage, place.activation_checkpointing)


def cost_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Time, money and energy."""
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


def placement_rows(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The configuration's own placement and the best ones; what a GPU holds and sends in a step, in GiB."""
    parts = [part for part in found[0]["memory"] if part != "peak"]
    yield ["", "fits", "ep_size", "ZeRO", "recompute", "peak", *parts, "sent"]
    own = [place for place in found if place["yours"]]
    for place in [*own, *(place for place in found[:SHOWN] if not place["yours"])]:
        fits = "yes" if place["fits"] else "no"
        recompute = "yes" if place["activation_checkpointing"] else "no"
        sizes = [place["memory"][part] for part in ("peak", *parts)] + [place["wire"]["total"]]
        yield [
            "config" if place["yours"] else "",
            *(fits, str(place["ep_size"]), str(place["zero_stage"]), recompute),
            *(f"{size / 2**30:,.2f}" for size in sizes),
        ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
