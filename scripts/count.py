"""What a model is and what it costs: parameters, FLOPs, memory, time, money and energy; nothing is built.

python scripts/count.py CONFIG... [section.key=value ...] [--hf PATH]... [--json]
python scripts/count.py configs/zoo/olmoe_1b_7b.yaml --gpu h100 --gpus 8 --tokens 5e12
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from moe.accounting.cost import projected_cost
from moe.accounting.count_tables import (
    SHOWN,
    cost_rows,
    layer_lines,
    overview_rows,
    part_rows,
    placement_rows,
)
from moe.accounting.counts import ModelCounts, count_parameters
from moe.accounting.gpus import GPU, GPU_NAMES, named_gpu
from moe.accounting.placement import USABLE, placements
from moe.config import Config, ConfigError, CostConfig, load_config, parse_config
from moe.config.command_line import OneLineParser, command, fraction, positive, positive_int
from moe.data.tokenizer import with_vocabulary
from moe.tables import align, gib

GPUS = 8  # without --gpus
Counted = tuple[ModelCounts, Config | None]  # None: a model of --hf


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, count, print."""
    options = parse(arguments)
    overrides = [item for item in options.items if "=" in item and not Path(item).exists()]
    paths = [Path(item) for item in options.items if item not in overrides]
    if not paths and not options.hf:
        raise ConfigError("CONFIG", "give a YAML file such as configs/tiny.yaml, or --hf PATH")
    if options.gpu is None and (options.gpus or options.tokens or options.mfu):
        raise ConfigError("--gpu", f"--gpus, --tokens and --mfu need it; name one of {GPU_NAMES}")
    gpu = named_gpu("--gpu", options.gpu) if options.gpu else None
    rates = cost_rates(overrides, options.hf)
    models = list(count(paths, overrides, options))
    records = [
        model.record() | ({} if gpu is None else on_gpus(model, config, rates, gpu, options))
        for model, config in models
    ]
    if options.json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=1))
    else:
        show([model for model, _ in models], records, gpu)
        if gpu is not None and options.gpus is None:
            print(f"{GPUS} GPUs are assumed; --gpus sets another number")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of this command."""
    parser = OneLineParser(
        prog="count.py",
        description="What a model is and what it costs: parameters, FLOPs, memory, time, money, energy.",
    )
    add = parser.add_argument
    items_help = "YAML files or folders of runs; overrides for all of them"
    add("items", nargs="*", metavar="CONFIG | RUN | key=value", help=items_help)
    hf_help = "a config.json, a model folder or a name on the Hugging Face hub"
    add("--hf", action="append", default=[], metavar="PATH", help=hf_help)
    add("--json", action="store_true", help="print JSON")
    seq_len_help = "tokens per sequence (default: the configuration's; for --hf at most 4096)"
    add("--seq-len", type=positive_int, help=seq_len_help)
    add("--gpu", help=f"memory and cost on one of {GPU_NAMES}")
    add("--gpus", type=positive_int, help=f"how many of them (default {GPUS})")
    add("--tokens", type=positive, help="of the training run (default: those of the configuration)")
    add("--mfu", type=fraction, help="utilisation to assume (default 0.4)")
    return parser.parse_intermixed_args(arguments)


def count(paths: list[Path], overrides: list[str], options: argparse.Namespace) -> Iterator[Counted]:
    """The models in the order of the command line."""
    if options.seq_len:
        overrides = [*overrides, f"data.seq_len={options.seq_len}", f"model.max_seq_len={options.seq_len}"]
    for path in map(config_file, paths):
        config = with_vocabulary(load_config(path, overrides))
        name = config.run.name if "name" in config.run.model_fields_set else path.stem
        yield replace(count_parameters(config), name=name), config
    if options.hf:
        from moe.accounting.huggingface import count_huggingface  # needs torch and transformers

        for source in options.hf:
            yield count_huggingface(source, options.seq_len), None


def config_file(path: Path) -> Path:
    """The YAML file, that of the folder if it is a run's."""
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix == ".json" or (path / "config.json").is_file():
        raise ConfigError("CONFIG", f"{path} is not a YAML file; for a Hugging Face model, write --hf {path}")
    return path


def cost_rates(overrides: list[str], hf: list[str]) -> CostConfig:
    """The rates among the overrides; others have nothing to change in a model of --hf."""
    rates = [item.partition("=") for item in overrides if item.startswith("cost.")]
    if hf and len(rates) < len(overrides):
        raise ConfigError("--hf", "takes no overrides but cost.*; edit the model's config.json instead")
    values = {key.removeprefix("cost."): yaml.safe_load(value) for key, _, value in rates}
    return parse_config({"cost": values}).cost


def on_gpus(
    model: ModelCounts, config: Config | None, rates: CostConfig, gpu: GPU, options: argparse.Namespace
) -> dict[str, Any]:
    """Cost of the training run, and where the configuration is ours, its topologies, best first."""
    gpus, mfu, tokens, found = options.gpus or GPUS, options.mfu or 0.4, options.tokens, []
    if config is not None:
        rates = config.cost
        own = (config.parallel.ep_size, config.parallel.zero_stage, config.train.activation_checkpointing)
        try:
            places = placements(config, gpus, gpu.memory)
        except ConfigError as error:
            raise ConfigError(error.key, f"{error.message}, or another --gpus than {gpus}") from None
        for place in places:
            is_own = own == (place.ep_size, place.zero_stage, place.activation_checkpointing)
            found.append(place.record() | {"yours": is_own})
        if {"steps", "global_batch_size"} <= config.train.model_fields_set:
            tokens = tokens or config.train.steps * config.train.global_batch_size * config.data.seq_len
    if tokens is None:
        raise ConfigError("--tokens", f"{model.name} does not say how many it is trained on; give them")
    return {
        "gpu": gpu.name,
        "gpus": gpus,
        "mfu": mfu,
        "tokens": tokens,
        "cost": asdict(projected_cost(tokens * model.flops_per_token_train, mfu, gpu, rates)),
        "recompute_factor": model.flops_per_token_recompute / model.flops_per_token_train,
        "placements": found,
    }


def show(models: list[ModelCounts], records: list[dict[str, Any]], gpu: GPU | None) -> None:
    """Print the tables."""
    print(align(list(overview_rows(models))))
    [(usual, _)] = Counter(model.seq_len for model in models).most_common(1)
    others = [f"{model.name}: {model.seq_len:,}" for model in models if model.seq_len != usual]
    lengths = f"{usual:,} tokens" + (f" ({', '.join(others)})" if others else "")
    print(f"active in three conventions; GFLOP per token, in sequences of {lengths}")
    if len(models) == 1:
        print("\n" + align(list(part_rows(models[0]))))
        print("".join(f"{line}\n" for line in layer_lines(models[0])), end="")
    if gpu is not None:
        for record in records:
            show_costs(record, gpu)


def show_costs(record: dict[str, Any], gpu: GPU) -> None:
    """Print what a model costs on these GPUs, and where it fits."""
    print(f"\n{record['name']} on {record['gpus']} x {gpu.name}")
    print(align(list(cost_rows(record))))
    if found := record["placements"]:
        print(
            f"fits {gib(USABLE * gpu.memory)}, {USABLE:.0%} of a GPU, experts evenly used; best first; "
            "GiB that a GPU holds, and sends in a step"
        )
        print(align(list(placement_rows(found))))
        if len(found) > SHOWN:
            print(f"and {len(found) - SHOWN} more: --json lists them all")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
