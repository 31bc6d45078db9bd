"""What a model is and what it costs: parameters, FLOPs, memory, time, money and energy; nothing is built.

python scripts/count.py CONFIG... [section.key=value ...] [--hf PATH]... [--json]
python scripts/count.py configs/zoo/olmoe_1b_7b.yaml --gpu h100 --gpus 8 --tokens 5e12
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.accounting import PARTS, Ledger, count
from moe.config import Config, ConfigError, CostConfig
from moe.config_io import OneLineParser, load_config, positive, positive_int
from moe.cost import GPU, GPUS, known_gpu, projected_cost
from moe.data.tokenizer import with_vocabulary
from moe.memory import placements
from moe.tables import align, plain, short

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
    parser.add_argument("--gpus", type=positive_int, default=8, help="how many of them (default 8)")
    parser.add_argument("--tokens", type=positive, help="of the training run (default: those of the config)")
    parser.add_argument("--mfu", type=positive, default=0.4, help="utilisation to assume (default 0.4)")
    options = parser.parse_intermixed_args(arguments)
    try:
        overrides = [item for item in options.items if "=" in item and not Path(item).exists()]
        if options.seq_len:
            overrides += [f"data.seq_len={options.seq_len}", f"model.max_seq_len={options.seq_len}"]
        paths = [Path(item) for item in options.items if item not in overrides]
        if not paths and not options.hf:
            raise ConfigError("CONFIG", "give a YAML file such as configs/tiny.yaml, or --hf PATH")
        models: list[tuple[Ledger, Config | None]] = []
        for path in paths:
            config = with_vocabulary(load_config(path, overrides))
            models.append((count(config), config))
        if options.hf:
            from moe.huggingface import count_huggingface  # needs torch and transformers

            models += [(count_huggingface(source, options.seq_len or 4096), None) for source in options.hf]
        records = [
            ledger.record() | ({} if options.gpu is None else on_gpus(ledger, config, options))
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
    print("GFLOP: per token, at each model's sequence length; embeddings: left out of the active parameters")
    if len(ledgers) == 1:
        print("\n" + align(list(details(ledgers[0]))))
        for line in layer_lines(ledgers[0]):
            print(line)
    if options.gpu is not None:
        for record in records:
            print(f"\n{record['name']} on {options.gpus} x {options.gpu.name}")
            print(align(list(cost_rows(record, options.mfu))))
            if record["placements"]:
                print("what fits, best first; GiB that a GPU holds, and sends in a step")
                print(align(list(placement_rows(record["placements"]))))
                if len(record["placements"]) > SHOWN:
                    print(f"and {len(record['placements']) - SHOWN} more: --json lists them all")
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


def on_gpus(ledger: Ledger, config: Config | None, options: argparse.Namespace) -> dict[str, Any]:
    """Cost of the training run, and where the configuration is ours, its topologies, best first."""
    gpu: GPU = options.gpu
    tokens, rates, found = options.tokens, CostConfig(), []
    if config is not None:
        rates, found = config.cost, placements(config, options.gpus, gpu.memory)
        tokens = tokens or config.train.steps * config.train.global_batch_size * config.data.seq_len
    if tokens is None:
        raise ConfigError("--tokens", f"{ledger.name} says nothing of its training; give their number")
    cost = projected_cost(tokens * ledger.flops_per_token_train, options.mfu, options.gpus, gpu, rates)
    return {
        "gpu": gpu.name,
        "gpus": options.gpus,
        "tokens": tokens,
        "cost": asdict(cost),
        "placements": [place.record() for place in found],
    }


def cost_rows(record: dict[str, Any], mfu: float) -> Iterator[list[str]]:
    """Time, money and energy."""
    cost = record["cost"]
    yield ["training tokens", short(record["tokens"])]
    yield ["FLOPs of the model", f"{cost['flops']:.3g}"]
    yield [f"GPU-hours at {mfu:.0%} utilisation", plain(cost["device_hours"])]
    yield ["days", plain(cost["device_hours"] / record["gpus"] / 24)]
    yield ["hardware burden, FLOPs", f"{cost['hardware_burden_flops']:.3g}"]
    yield ["price", "unknown: set cost.usd_per_hour" if cost["usd"] is None else "$" + plain(cost["usd"])]
    yield ["electricity", plain(cost["kwh"]) + " kWh"]
    yield ["emissions", plain(cost["tco2e"]) + " tCO2e"]


def placement_rows(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """The best ways to place the run, and what a GPU holds and sends in a step, in GiB."""
    parts = [part for part in found[0]["memory"] if part != "peak"]
    yield ["fits", "ep_size", "zero_stage", "recompute", "peak", *parts, "sent"]
    for place in found[:SHOWN]:
        flags = ("yes" if place["fits"] else "no", place["ep_size"], place["zero_stage"])
        sizes = [place["memory"][part] for part in ("peak", *parts)] + [place["wire"]["total"]]
        recompute = "yes" if place["activation_checkpointing"] else "no"
        yield [*map(str, flags), recompute, *(f"{size / 2**30:,.2f}" for size in sizes)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
