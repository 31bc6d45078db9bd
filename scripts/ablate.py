"""Train configurations that differ in settings of the experts at equal active FLOPs, and report them.

python scripts/ablate.py configs/sweep.yaml --vary moe.num_experts=1,2,4,8,16,32 --out sweeps/experts
python scripts/ablate.py configs/sweep.yaml --vary granularity=1,2,4 --out sweeps/granularity --dry-run
"""

import argparse
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.ablation.ablation_folder import SweepFolder
from moe.ablation.cells import GRANULARITY, Cell, plan
from moe.ablation.html_report import write_report
from moe.ablation.runner import Sweep, Task
from moe.accounting.counts import count
from moe.accounting.memory import estimate_memory
from moe.config.loading import OneLineParser, load_config, override_value, parse_config, positive_int
from moe.config.schema import Config, ConfigError
from moe.data.tokenizer import with_vocabulary
from moe.dispatch.all_to_all import LocalDispatcher
from moe.distributed.launch import choose_device
from moe.model.grouped_mm import choose_expert_path
from moe.model.transformer import Transformer, init_weights
from moe.tables import align, gib, plain, short

ROOT = Path(__file__).parent.parent
QUICK = 10  # times fewer steps
UPDATE_SECONDS = 7e-9  # of ZeRO's update per parameter, measured on a 33.5M model


def main(arguments: list[str]) -> int:
    """Parse the command line, plan, train what is missing, report."""
    parser = OneLineParser(prog="ablate.py", description="Train a sweep at equal active FLOPs and report it.")
    parser.add_argument(
        "items", nargs="+", metavar="CONFIG | key=value", help="the reference, then overrides"
    )
    parser.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="KEY=V1,V2",
        help="a setting and its values; granularity=1,2 multiplies experts and top_k and divides their width",
    )
    parser.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    parser.add_argument(
        "--hold",
        choices=("active_flops", "total_params", "memory", "none"),
        default="active_flops",
        help="what the width of the experts keeps equal (default active_flops)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the sweep")
    parser.add_argument(
        "--jobs",
        type=positive_int,
        help="runs side by side, a thread each (default: one per core; one on a GPU or with --launcher)",
    )
    parser.add_argument(
        "--launcher", default="", help="such as 'torchrun --nproc-per-node 8'; runs go one after the other"
    )
    parser.add_argument("--quick", action="store_true", help=f"1/{QUICK} of the steps; a trial, not a result")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    options = parser.parse_intermixed_args(arguments)
    folder = SweepFolder(options.out.expanduser())
    try:
        start, seeds = launcher_of(options), seeds_of(options.seeds)
        path, *overrides = options.items
        if any(item.startswith("run.") for item in overrides):
            raise ConfigError("run.*", "is set by the sweep for each run; leave it out")
        config = with_vocabulary(load_config(Path(path), overrides))
        if config.moe.is_dense:
            raise ConfigError("moe.num_experts", "the reference should be sparse; give it more than one")
        device = choose_device(config.parallel).type
        config = shortened(config) if options.quick else config
        cells = plan(config, varied(options.vary), options.hold, device)
        folder.check(cells)
        jobs = options.jobs or (1 if options.launcher or device == "cuda" else len(os.sched_getaffinity(0)))
        on_cpu = device == "cpu" and not options.launcher
        show(cells, config, seeds, jobs, device, seconds_per_flop(config) if on_cpu else None)
        if options.quick:
            print(
                f"quick: 1/{QUICK} of the steps, models far from converged: neither the size of the "
                "differences nor the order of close cells carries over to the whole training"
            )
        if options.dry_run:
            return 0
        command = {"vary": options.vary, "hold": options.hold, "quick": options.quick}
        with folder.locked():
            folder.add_plan(cells, seeds, command)
            # A whole curve of one seed comes before the next seed's.
            tasks = [Task(cell, seed, folder.run(cell.name, seed)) for seed in seeds for cell in cells]
            # A thread each: runs of several threads on the same cores wait for each other by spinning, and
            # rounding depends on the number of threads.
            sweep = Sweep(folder, tasks, [*start, str(ROOT / "train.py")], jobs, 1 if on_cpu else None)
            return train_and_report(sweep, tasks, folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def launcher_of(options: argparse.Namespace) -> list[str]:
    """What starts train.py."""
    if not options.launcher:
        return [sys.executable]
    try:
        words = shlex.split(options.launcher)
    except ValueError as error:
        raise ConfigError("--launcher", f"cannot be read ({error}), got {options.launcher!r}") from None
    if words and Path(words[0]).name == "deepspeed":
        raise ConfigError("--launcher", "deepspeed leaves its ranks behind when it is stopped; use torchrun")
    if not words or shutil.which(words[0]) is None:
        raise ConfigError("--launcher", f"there is no such command: {options.launcher!r}")
    if options.jobs is not None:
        raise ConfigError("--jobs", "runs with --launcher go one after the other; leave one of the two out")
    return words


def seeds_of(text: str) -> list[int]:
    """Whole numbers with commas between."""
    parts = text.split(",")
    seeds = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 19]
    if len(set(seeds)) < len(parts):
        raise ConfigError("--seeds", f"should be different whole numbers such as 0,1,2, got {text[:80]!r}")
    return seeds


def varied(options: list[str]) -> dict[str, list[Any]]:
    """Keys and values of --vary; values are read as those of overrides."""
    found: dict[str, list[Any]] = {}
    for option in options:
        key, _, text = option.partition("=")
        texts = text.split(",")
        if not key or not all(texts):
            raise ConfigError("--vary", f"{option!r} is not key=value,value; write moe.num_experts=1,8")
        if key in found:
            raise ConfigError("--vary", f"{key} is given twice; give its values once, with commas between")
        prefix = "moe." if key == GRANULARITY else ""  # an override needs a section
        found[key] = [override_value(f"{prefix}{key}={one}") for one in texts]
        if len({str(value) for value in found[key]}) < len(texts):
            raise ConfigError("--vary", f"{option!r} has a value twice")
    return found


def shortened(config: Config) -> Config:
    """The reference with 1/QUICK of the steps, evaluated twice."""
    values = config.model_dump(mode="json")
    steps = max(config.train.steps // QUICK, 1)
    half = math.ceil(steps / 2)
    values["train"] |= {"steps": steps, "eval_interval": half, "checkpoint_interval": half}
    values["optim"]["warmup_steps"] //= QUICK
    return parse_config(values)


def seconds_per_flop(config: Config) -> float | None:
    """Time over FLOPs of a forward and backward pass of the reference; None where it is too large."""
    if count(config).total > 50e6:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Transformer(config, LocalDispatcher(), choose_expert_path(torch.device("cpu"), torch.float32))
    init_weights(model, 0)
    assert config.model.vocab_size is not None
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len))
    fastest = math.inf
    for _ in range(4):  # the first pass loads libraries
        started = time.perf_counter()
        model(tokens).logits.float().logsumexp(2).mean().backward()
        fastest = min(fastest, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return fastest / (tokens.numel() * count(config).flops_per_token_train)


def show(
    cells: Sequence[Cell],
    config: Config,
    seeds: Sequence[int],
    jobs: int,
    device: str,
    per_flop: float | None,
) -> None:
    """Print the plan, a row per cell, and what it takes in all."""
    steps, batch = config.train.steps, config.train.global_batch_size * config.data.seq_len
    seconds = [
        None
        if per_flop is None
        else steps
        * (batch * cell.ledger.flops_per_token_train * per_flop + UPDATE_SECONDS * cell.ledger.total)
        for cell in cells
    ]

    def rows() -> Iterator[list[str]]:
        yield ["", "", "", "expert", "parameters", "parameters", "FLOPs", "off", "memory", "FLOPs", "seconds"]
        yield ["cell", "experts", "top_k", "width", "total", "active", "a token", "by", "", "a run", "a run"]
        for cell, time_of_run in zip(cells, seconds, strict=True):
            moe, ledger = cell.config.moe, cell.ledger
            yield [
                cell.name,
                str(moe.num_experts),
                str(moe.top_k),
                str(moe.d_ff_expert),
                f"{ledger.total:,}",
                f"{ledger.active_all:,}",
                f"{ledger.flops_per_token_train:,}",
                f"{cell.mismatch:+.2%}",
                gib(estimate_memory(cell.config, config.parallel.ep_size, device).peak),
                f"{steps * batch * ledger.flops_per_token_train:.2e}",
                "" if time_of_run is None else plain(time_of_run),
            ]

    print(align(list(rows())))
    known = [time_of_run for time_of_run in seconds if time_of_run is not None]
    if known:
        minutes = sum(known) * len(seeds) / jobs / 60
        duration = f"about {plain(minutes)} minutes, {jobs} at a time, evaluation not counted"
    else:
        duration = f"the time was not estimated{'' if device == 'cpu' else ': see scripts/count.py --gpu'}"
    print(f"{len(cells) * len(seeds)} runs of {short(steps * batch)} tokens; {duration}")


def train_and_report(sweep: Sweep, tasks: list[Task], folder: SweepFolder) -> int:
    """Train, report; 1 if a run failed, 130 if stopped by Ctrl-C or SIGTERM."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # Also where a shell without job control started this in the background, and had SIGINT ignored.
    previous = {name: signal.signal(name, interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        sweep.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
    if any(task.is_finished for task in tasks):
        try:
            print("\n".join(write_report(folder.path)))
        except ConfigError as error:
            print(f"error: {error}; then: python scripts/report.py {folder.path}", file=sys.stderr)
            return 1
        print(f"see {folder.path / 'report.html'}")
    return 0 if all(task.is_finished for task in tasks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
