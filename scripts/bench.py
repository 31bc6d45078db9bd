"""How fast it is: a layer against others, the parts of a training step, split experts, generation.

python scripts/bench.py layer [--experts 8,64] [--tokens 2048] [--contenders moe,dense,...] [--json]
python scripts/bench.py step CONFIG... [section.key=value ...] [--steps N] [--json]
python scripts/bench.py dispatch [CONFIG] [section.key=value ...] [--ranks 1,2,4,8] [--json]
python scripts/bench.py generate RUN [--new-tokens N] [--json]
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moe.config.command_line import OneLineParser, command, end_on_ctrl_c, positive, positive_int

if __name__ == "__main__":
    end_on_ctrl_c()  # while torch is imported, which takes seconds

import torch

from moe.benchmark.contenders_by_name import CONTENDERS, check_names, is_comparable
from moe.benchmark.dispatch_speed import measure_dispatch, split_configs
from moe.benchmark.generation_speed import measure_generation
from moe.benchmark.layer_problem import layer_shapes
from moe.benchmark.layer_speed import measure_layers
from moe.benchmark.processes import ALWAYS_OWN_PROCESS, layer_device, running_contenders
from moe.benchmark.speed_tables import dispatch_rows, generation_rows, layer_rows, step_rows
from moe.benchmark.step_speed import TrainingLoop, measure_steps
from moe.config import ConfigError, load_config
from moe.data.tokenizer import with_vocabulary
from moe.distributed.launch import keep_freed_memory, leave
from moe.inference.trained_run import load_run
from moe.model.transformer import Transformer
from moe.runs.environment import describe_environment
from moe.tables import align

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.yaml")
KEEP_MEMORY = ("moe", "dense")  # whose own processes keep freed memory, as those that train do
LAYER_NOTE = """\
milliseconds, medians; quartiles of forward and backward together; memory without weights and their
gradients. backward: the median of both less that of the forward pass. Outputs, the input's gradient and
the norm of the weights' gradients were compared with those of moe_reference before."""
STEP_NOTE = """\
milliseconds, medians. rest: reading samples, the loss, metrics. The floor is the same model in plain
PyTorch, with AdamW(fused=True) and clip_grad_norm_."""
DISPATCH_NOTE = """\
of one MoE layer on one rank, forward and backward; the global batch is the same on any number of ranks.
sent: rows that one forward pass sends to other ranks; expected: the same by the formula, with uniform
routing; step expected: all layers, there and back, both passes, with gate weights and expert ids.
This machine has {cores} cores: with more ranks than that, times are those of ranks that wait for a core."""


@command
def main(arguments: list[str]) -> int:
    """Measure what the first argument names, and print it."""
    parser = OneLineParser(prog="bench.py", description="How fast it is. Each measurement takes --help.")
    parser.add_argument("what", choices=MEASUREMENTS, help="what to measure")
    what = parser.parse_args(arguments[:1]).what
    MEASUREMENTS[what](arguments[1:])
    return 0


def layer(arguments: list[str]) -> None:
    """One layer against its reference, a dense block, bare matrix products, and other libraries."""
    options = parse_layer(arguments)
    names = options.contenders.split(",") if options.contenders else CONTENDERS
    check_names(names)
    shapes = layer_shapes(options.experts, options.tokens, options.top_k, options.d_model)
    left_out = [name for name in names if not all(is_comparable(name, shape) for shape in shapes)]
    if left_out and options.contenders:
        raise ConfigError("--contenders", f"{left_out[0]} computes something else at top-1; leave it out")
    check_plot(options.plot, names)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    keeps = not options.default_allocator
    own = names if options.own_process else ALWAYS_OWN_PROCESS if keeps else ()
    if keeps and not options.own_process:
        keep_freed_memory()
    run = partial(running_contenders, own=own, keep_memory=KEEP_MEMORY if keeps else ())
    records = []
    for of_shape in measure_layers(shapes, names, run, options.repeats, options.budget):
        records += of_shape
        if not options.json:
            print(align(list(layer_rows(of_shape))) + "\n", flush=True)
    if options.json:
        precision = "bf16" if layer_device().type == "cuda" else "fp32"
        keeping = [name for name in names if keeps and (name not in own or name in KEEP_MEMORY)]
        print_json(records, precision=precision, own_process=options.own_process, keeps_freed_memory=keeping)
    else:
        print(LAYER_NOTE)
        if left_out:
            print(f"Left out at top-1, where they compute something else: {', '.join(left_out)}")
    if options.plot:
        from moe.benchmark.speed_plot import plot_speeds  # needs matplotlib

        plot_speeds(records, options.plot)


def parse_layer(arguments: list[str]) -> argparse.Namespace:
    """The options of `layer`."""
    parser = OneLineParser(prog="bench.py layer", description=layer.__doc__)
    add = parser.add_argument
    add("--experts", type=positive_ints, default=[8, 16, 64, 128], help="default 8,16,64,128")
    add("--tokens", type=positive_ints, default=[2048, 8192], help="in a pass (default 2048,8192)")
    add("--d-model", type=positive_int, default=512, help="width of a token (default 512)")
    add("--top-k", type=positive_ints, default=[2], help="default 2; an expert's width is 4 d_model / top-k")
    add("--contenders", help=f"some of {','.join(CONTENDERS)} (default: all)")
    add("--threads", type=positive_int, help="default: those that torch takes")
    add("--repeats", type=positive_int, default=9, help="timed passes of each at most (default 9)")
    budget_help = "seconds of a contender at one shape, after which it is not timed again (default 20)"
    add("--budget", type=positive, default=20.0, help=budget_help)
    add("--own-process", action="store_true", help="a process for each contender")
    allocator_help = "glibc's default, which returns freed memory to the system and gets it back page by page"
    add("--default-allocator", action="store_true", help=allocator_help)
    add("--plot", type=Path, metavar="FILE.png", help="draw the speeds relative to dense")
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def check_plot(path: Path | None, names: Sequence[str]) -> None:
    """Refuse a picture that could not be drawn in the end."""
    if path is None:
        return
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise ConfigError("--plot", f"{path} should be a .png file in a folder that exists")
    if "dense" not in names:
        raise ConfigError("--plot", "speeds are drawn relative to dense; add it to --contenders")


def step(arguments: list[str]) -> None:
    """The parts of a training step, beside what plain PyTorch needs for them."""
    parser = OneLineParser(prog="bench.py step", description=step.__doc__)
    parser.add_argument("items", nargs="+", metavar="CONFIG | key=value", help="YAML files; overrides of all")
    parser.add_argument("--steps", type=positive_int, default=20, help="timed steps of each (default 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_items(options.items)
    if not paths:
        raise ConfigError("CONFIG", "give a YAML file such as configs/tiny.yaml")
    configs = [(path, load_config(path, overrides)) for path in paths]
    sys.path.insert(0, str(ROOT))
    import train

    loop = TrainingLoop(train.prepare, train.build, train.train_step)
    records = measure_steps(loop, configs, options.steps)
    if options.json:
        print_json(records, steps=options.steps)
    else:
        print(align(list(step_rows(records))) + "\n" + STEP_NOTE)


def dispatch(arguments: list[str]) -> None:
    """What a rank computes and sends when several ranks split the experts of a layer."""
    parser = OneLineParser(prog="bench.py dispatch", description=dispatch.__doc__)
    parser.add_argument("items", nargs="*", metavar="CONFIG | key=value", help="default configs/tiny.yaml")
    parser.add_argument("--ranks", type=positive_ints, default=[1, 2, 4, 8], help="default 1,2,4,8")
    parser.add_argument("--repeats", type=positive_int, default=9, help="timed passes (default 9)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_items(options.items)
    if len(paths) > 1:
        raise ConfigError("CONFIG", f"give one YAML file, not {len(paths)}")
    config = with_vocabulary(load_config(paths[0] if paths else TINY, overrides))
    configs = split_configs(config, options.ranks)
    records = [measure_dispatch(config, options.repeats) for config in configs]
    if options.json:
        print_json(records, config=paths[0] if paths else TINY, threads_per_rank=1)
    else:
        print(align(list(dispatch_rows(records))) + "\n" + DISPATCH_NOTE.format(cores=os.cpu_count()))


def generate(arguments: list[str]) -> None:
    """Tokens per second of text generation."""
    parser = OneLineParser(prog="bench.py generate", description=generate.__doc__)
    run_help = "a run folder, such as runs/tiny; with --config, overrides"
    parser.add_argument("items", nargs="*", metavar="RUN | key=value", help=run_help)
    parser.add_argument("--config", help="instead of a run: a YAML file, whose model gets initial weights")
    parser.add_argument("--new-tokens", type=positive_int, default=256, help="in each run (default 256)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed runs (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_intermixed_args(arguments)
    paths, overrides = split_items(options.items)
    if len(paths) != (0 if options.config else 1) or (overrides and not options.config):
        raise ConfigError("RUN", "give one run folder such as runs/tiny, or --config CONFIG and overrides")
    if options.config:
        config = with_vocabulary(load_config(options.config, overrides))
        model = Transformer(config).to(layer_device()).eval()
    else:
        model = load_run(paths[0], layer_device()).model
    record = measure_generation(model, options.new_tokens, options.repeats)
    record = {"model": options.config or paths[0]} | record
    if options.json:
        print_json([record])
    else:
        print(align(list(generation_rows(record))))


def split_items(items: list[str]) -> tuple[list[str], list[str]]:
    """Paths, and overrides such as moe.top_k=1."""
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    return [item for item in items if item not in overrides], overrides


def print_json(records: list[dict[str, Any]], **settings: Any) -> None:
    """Print the records together with hardware, threads, versions, code, and how it was measured."""
    machine = describe_environment(num_ranks=1)
    with suppress(PackageNotFoundError):
        machine["versions"]["transformers"] = version("transformers")
    print(json.dumps({"machine": machine | settings, "results": records}, indent=1))


def positive_ints(text: str) -> list[int]:
    """The argument of an option that is a list of whole numbers above 0."""
    try:
        return list(dict.fromkeys(positive_int(part) for part in text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"should be numbers such as 8,64, got {text!r}") from None


MEASUREMENTS = {"layer": layer, "step": step, "dispatch": dispatch, "generate": generate}

if __name__ == "__main__":
    code = main(sys.argv[1:])
    leave()
    sys.exit(code)
