"""Train configurations that differ in settings of the experts at equal active FLOPs, and report them.

With --hold seconds they train for equal time instead of equal steps.

python scripts/ablate.py configs/ablation.yaml --vary moe.num_experts=1,2,4,8,16,32 --out ablations/experts
python scripts/ablate.py configs/ablation.yaml --vary granularity=1,2,4 --out ablations/granularity --dry-run
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe.config.command_line import INTERRUPTED, OneLineParser, command, end_on_ctrl_c, positive_int

if __name__ == "__main__":
    end_on_ctrl_c()  # while torch is imported, which takes seconds

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import GRANULARITY, Cell, plan_cells, shortened
from moe.ablation.estimate import START_SECONDS, plan_table, seconds_per_run
from moe.ablation.race import plan_race, race_table, uncertain
from moe.ablation.runner import AblationRunner, Conditions, Task, stopped_by_signals
from moe.ablation.step_times import ROUNDS, measure_step_times
from moe.config import Config, ConfigError, RunError, load_config, override_value
from moe.data.tokenizer import with_vocabulary
from moe.distributed.launch import choose_device
from moe.tables import align, duration, short

TRAIN = Path(__file__).parents[1] / "train.py"
QUICK = 10  # times fewer steps
RACE = "seconds"  # the quantity that a race by the clock holds


@command
def main(arguments: list[str]) -> int:
    """Parse the command line, plan, train what is missing, report."""
    options = parse(arguments)
    folder, seeds = AblationFolder(options.out.expanduser()), parse_seeds(options.seeds)
    start = parse_launcher(options)
    config = reference(options)
    device = choose_device(config.parallel).type
    race = options.hold == RACE
    hold = "active_flops" if race else options.hold
    cells = plan_cells(config, parse_vary(options.vary), hold, device, baselines=not options.no_dense)
    if race and not any(cell.is_dense for cell in cells):
        problem = f"with --hold {RACE} all cells get the time of a dense one; vary moe.num_experts=1,... too"
        raise ConfigError("--no-dense", problem)
    on_cpu = device == "cpu" and not options.launcher
    jobs = options.jobs or (len(os.sched_getaffinity(0)) if on_cpu else 1)
    # A thread each: runs of several threads on the same cores wait for each other by spinning, and rounding
    # depends on the number of threads.
    conditions = Conditions(start, min(jobs, len(cells) * len(seeds)), threads=1 if on_cpu else None)
    record = {"vary": options.vary, "hold": options.hold, "quick": options.quick}
    if race:
        measured_with = {"--jobs": conditions.jobs, "--launcher": options.launcher, "parallel.device": device}
        record["race"] = measured_with
    folder.check_race(record.get("race"))
    if race:
        rounds = ROUNDS // 5 if options.quick else ROUNDS
        measure = partial(measure_step_times, train=TRAIN, conditions=conditions, rounds=rounds)
        try:
            with stopped_by_signals():
                cells = plan_race(cells, config, folder, measure)
        except KeyboardInterrupt:
            print("stopped before any run; nothing was written")
            return INTERRUPTED
    folder.check(cells)
    show_plan(cells, config, len(seeds), device, conditions)
    if options.quick:
        print(
            f"quick: 1/{QUICK} of the steps, models far from converged: neither the size of the "
            "differences nor the order of close cells carries over to the whole training"
        )
    if options.dry_run:
        return 0
    with folder.locked():
        folder.add_plan(cells, seeds, record)
        # A whole curve of one seed comes before the next seed's.
        tasks = [Task(cell, seed, folder.run(cell.name, seed)) for seed in seeds for cell in cells]
        return train_and_report(AblationRunner(folder, tasks, TRAIN, conditions), tasks, folder)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of this command."""
    parser = OneLineParser(prog="ablate.py", description="Train and report an ablation of the experts.")
    add = parser.add_argument
    add("items", nargs="+", metavar="CONFIG | key=value", help="the reference, then overrides")
    vary_help = "a setting of the experts and its values; granularity=1,2 splits every expert into 1 or 2"
    add("--vary", action="append", required=True, metavar="KEY=V1,V2", help=vary_help)
    add("--seeds", default="0,1,2", help="default 0,1,2")
    hold_help = "what the width of the experts keeps equal (default active_flops); seconds: active FLOPs per "
    hold_help += "token, and every cell trains for the measured time of the dense one"
    holds = ("active_flops", "total_params", "memory", RACE, "none")
    add("--hold", choices=holds, default="active_flops", help=hold_help)
    add("--no-dense", action="store_true", help="add no dense models but those of --vary")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the ablation")
    jobs_help = "runs side by side, a thread each (default: one per core; one on a GPU or with --launcher)"
    add("--jobs", type=positive_int, help=jobs_help)
    launcher_help = "such as 'torchrun --nproc-per-node 8'; runs go one after the other"
    add("--launcher", default="", help=launcher_help)
    add("--quick", action="store_true", help=f"1/{QUICK} of the steps; a trial, not a result")
    add("--dry-run", action="store_true", help="print the plan and train nothing")
    return parser.parse_intermixed_args(arguments)


def reference(options: argparse.Namespace) -> Config:
    """The configuration that all cells start from."""
    path, *overrides = options.items
    if any(item.startswith("run.") for item in overrides):
        raise ConfigError("run.*", "is set for each run of the ablation; leave it out")
    config = with_vocabulary(load_config(Path(path), overrides))
    if config.moe.is_dense:
        raise ConfigError("moe.num_experts", "the reference should be sparse; give it more than one")
    return shortened(config, QUICK) if options.quick else config


def parse_launcher(options: argparse.Namespace) -> list[str]:
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


def parse_seeds(text: str) -> list[int]:
    """Whole numbers with commas between."""
    parts = text.split(",")
    seeds = [int(part) for part in parts if part.isascii() and part.isdecimal() and len(part) < 19]
    if len(set(seeds)) < len(parts):
        raise ConfigError("--seeds", f"should be different whole numbers such as 0,1,2, got {text[:80]!r}")
    return seeds


def parse_vary(options: list[str]) -> dict[str, list[Any]]:
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


def show_plan(
    cells: Sequence[Cell], config: Config, num_seeds: int, device: str, conditions: Conditions
) -> None:
    """Print what will be trained, and how long it takes: as measured in a race, else roughly, on a CPU."""
    raced = [cell.planned_seconds for cell in cells if cell.planned_seconds is not None]
    known = raced or (seconds_per_run(cells, config) if conditions.threads else None)
    seconds = known and [START_SECONDS + of_cell for of_cell in known]
    print(align(list(plan_table(cells, device, seconds))))
    if raced:
        print(align(list(race_table(cells, config))))
        if warning := uncertain(cells):
            print(f"warning: {warning}")
    fewest, most = (short(limit(cell.tokens for cell in cells)) for limit in (min, max))
    time = "the time was not estimated: see scripts/count.py --gpu"
    if seconds:
        total = duration(sum(seconds) * num_seeds / conditions.jobs)
        start = f"the start of a run counted as {START_SECONDS} seconds"
        time = f"about {total}, {conditions.jobs} at a time, {start}"
        time += ", evaluation not counted" if raced else ""
    tokens = most if fewest == most else f"{fewest} to {most}"
    print(f"{len(cells) * num_seeds} runs of {tokens} tokens; {time}")


def train_and_report(runner: AblationRunner, tasks: list[Task], folder: AblationFolder) -> int:
    """Train, report; 1 if a run failed, 130 if stopped by Ctrl-C or SIGTERM."""
    try:
        with stopped_by_signals():
            runner.run()
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue")
        return INTERRUPTED
    if any(task.is_finished for task in tasks):
        from moe.ablation.html_report import write_report  # with scipy and matplotlib, which take two seconds

        try:
            print("\n".join(write_report(folder.path)))
        except ConfigError as error:
            raise RunError(f"{error}; then: python scripts/report.py {folder.path}") from None
        print(f"see {folder.path / 'report.html'}")
    return 0 if all(task.is_finished for task in tasks) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
