"""Train configurations that differ in named settings at equal active FLOPs, and report what they show.

python scripts/ablate.py configs/tiny.yaml --vary moe.num_experts=1,2,4,8,16,32 --out sweeps/experts
python scripts/ablate.py configs/tiny.yaml --vary granularity=1,2,4 --out sweeps/granularity --dry-run
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.ablation import Cell, plan
from moe.accounting import Ledger, count
from moe.config import Config, ConfigError
from moe.config_io import OneLineParser, dump_config, load_config, positive_int
from moe.data.tokenizer import with_vocabulary
from moe.dispatch import LocalDispatcher
from moe.memory import estimate_memory
from moe.ops.grouped_mm import choose_expert_path
from moe.run_folder import RunFolder
from moe.sweep_page import write_report
from moe.tables import align, gib, plain
from moe.transformer import Transformer, init_weights

ROOT = Path(__file__).parent.parent
UPDATE_SECONDS = 7e-9  # of ZeRO's update per parameter, measured on a 33.5M model
QUICK = [
    "train.steps=400",
    "train.eval_interval=400",
    "train.checkpoint_interval=400",
    "optim.warmup_steps=20",
]


@dataclass(frozen=True)
class Task:
    """One cell with one seed: an ordinary run of train.py."""

    cell: Cell
    seed: int
    folder: RunFolder


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
        "--jobs", type=positive_int, default=os.cpu_count(), help="runs side by side, a thread each"
    )
    parser.add_argument(
        "--launcher", help="such as 'torchrun --nproc-per-node 8'; then one run after the other"
    )
    parser.add_argument(
        "--quick", action="store_true", help="400 steps a run: what that cannot resolve, it says"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    options = parser.parse_intermixed_args(arguments)
    try:
        path, *overrides = options.items
        config = with_vocabulary(load_config(Path(path), [*overrides, *(QUICK if options.quick else [])]))
        if config.moe.is_dense:
            raise ConfigError(
                "moe.num_experts", "the reference should be sparse; give it more than one expert"
            )
        cells = plan(config, varied(options.vary), options.hold)
        tasks = [
            Task(cell, seed, RunFolder(options.out / "runs" / cell.name / f"seed-{seed}"))
            for seed in numbers("--seeds", options.seeds)  # a whole curve first, then the next seed's
            for cell in cells
        ]
        print(align(list(table(cells, config, seconds_per_flop(config)))))
        print("seconds: rough, one thread, without evaluation; for large models see scripts/count.py --gpu")
        if options.dry_run:
            return 0
        write_plan(options.out, cells, options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return train_all(tasks, options)


def varied(options: list[str]) -> dict[str, list[Any]]:
    """Keys and values of --vary; values are read as YAML."""
    found = {}
    for option in options:
        key, equals, values = option.partition("=")
        if not equals or not values:
            raise ConfigError("--vary", f"{option!r} is not key=value,value; write moe.num_experts=1,8")
        found[key] = [yaml.safe_load(value) for value in values.split(",")]
    return found


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers with commas between."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(option, f"should be different whole numbers such as 0,1,2, got {text!r}")
    return [int(part) for part in parts]


def seconds_per_flop(config: Config) -> float | None:
    """Time over FLOPs of a forward and backward pass of the reference; None where it is too large."""
    if count(config).total > 50e6:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = choose_expert_path(torch.device("cpu"), torch.float32)
    model = Transformer(config, LocalDispatcher(), path)
    init_weights(model, 0)
    assert config.model.vocab_size is not None
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len))
    for _ in range(2):  # the first pass loads libraries
        started = time.perf_counter()
        model(tokens).logits.float().logsumexp(2).mean().backward()
        elapsed = time.perf_counter() - started
    torch.set_num_threads(threads)
    return elapsed / (tokens.numel() * count(config).flops_per_token_train)


def table(cells: list[Cell], config: Config, per_flop: float | None) -> Iterator[list[str]]:
    """The plan, a row per cell."""
    tokens = config.train.steps * config.train.global_batch_size * config.data.seq_len
    yield ["", "", "", "expert", "parameters", "parameters", "FLOPs", "off", "memory", "FLOPs", "seconds"]
    yield [
        "cell",
        "experts",
        "top_k",
        "width",
        "total",
        "active",
        "a token",
        "by",
        "a rank",
        "a run",
        "a run",
    ]
    for cell in cells:
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
            gib(estimate_memory(cell.config, 1, "cpu").peak),
            f"{tokens * ledger.flops_per_token_train:.2e}",
            "" if per_flop is None else plain(_seconds(config, ledger, per_flop)),
        ]


def _seconds(config: Config, ledger: Ledger, per_flop: float) -> float:
    tokens = config.train.global_batch_size * config.data.seq_len
    update = UPDATE_SECONDS * ledger.total
    return config.train.steps * (tokens * ledger.flops_per_token_train * per_flop + update)


def write_plan(out: Path, cells: list[Cell], options: argparse.Namespace) -> None:
    """The plan and a configuration per cell; a folder that holds another plan is refused."""
    record = {
        "hold": options.hold,
        "vary": options.vary,
        "quick": options.quick,
        "cells": [
            {
                "name": cell.name,
                "settings": dict(cell.settings),
                "mismatch": cell.mismatch,
                "is_dense": cell.is_dense,
                "config": cell.config.model_dump(mode="json", exclude={"run"}),
            }
            for cell in cells
        ],
    }
    file, text = out / "plan.json", json.dumps(record, indent=1)
    if file.exists() and file.read_text() != text:
        raise ConfigError("--out", f"{out} holds another sweep; give the same settings or another folder")
    try:
        (out / "configs").mkdir(parents=True, exist_ok=True)
        (out / "logs").mkdir(exist_ok=True)
        for cell in cells:
            (out / "configs" / f"{cell.name}.yaml").write_text(dump_config(cell.config))
        file.write_text(text)
    except OSError as error:
        raise ConfigError("--out", f"cannot write {out} ({error.strerror}); choose another folder") from None


def train_all(tasks: list[Task], options: argparse.Namespace) -> int:
    """Train what is not finished, some side by side; report; 1 if a run failed, 130 if stopped."""
    missing = [task for task in tasks if not task.folder.summary.exists()]
    print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are finished", flush=True)
    sweep = Sweep(options, len(missing))
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with ThreadPoolExecutor(1 if options.launcher else options.jobs) as pool:
            try:
                codes = list(pool.map(sweep.train, missing))
            except KeyboardInterrupt:
                sweep.stop()
                raise
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        write_results(tasks, options.out)
        if any(task.folder.summary.exists() for task in tasks):
            for sentence in write_report(options.out):
                print(sentence)
            print(f"see {options.out / 'report.html'}")
    return 1 if any(codes) else 0


class Sweep:
    """Runs of train.py in processes of their own.

    Args:
        options: of the command line.
        num_runs: how many there will be, for the progress lines.
    """

    def __init__(self, options: argparse.Namespace, num_runs: int):
        self.options, self.num_runs = options, num_runs
        self._done, self._stopping = 0, False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def train(self, task: Task) -> int:
        """One run, to its end; what it prints goes to its log. The exit code."""
        if self._stopping:
            return 0
        name = f"{task.cell.name}-{task.seed}"
        launcher = shlex.split(self.options.launcher) if self.options.launcher else [sys.executable]
        command = [
            *launcher,
            str(ROOT / "train.py"),
            str(self.options.out / "configs" / f"{task.cell.name}.yaml"),
            f"run.dir={task.folder.path}",
            f"run.seed={task.seed}",
        ]
        # A thread each: runs of several threads on the same cores wait for each other by spinning, and
        # rounding depends on the number of threads.
        environment = {"OMP_NUM_THREADS": "1", "WANDB_RUN_GROUP": self.options.out.name} | os.environ
        started = time.perf_counter()
        with (self.options.out / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            with self._lock:
                self._processes.add(process)
            code = process.wait()
        with self._lock:
            self._processes.discard(process)
            self._done += 1
            outcome = "done" if code == 0 else f"FAILED with exit code {code}, see logs/{name}.log"
            seconds = time.perf_counter() - started
            print(f"{self._done}/{self.num_runs}  {name}: {outcome} after {seconds:,.0f} s", flush=True)
        return code

    def stop(self) -> None:
        """Let the runs save, and start no more."""
        self._stopping = True
        with self._lock:
            for process in self._processes:
                process.send_signal(signal.SIGTERM)


def write_results(tasks: list[Task], out: Path) -> None:
    """`results.jsonl`: a line per run, finished or not, in the order of the plan."""
    lines = []
    for task in tasks:
        line = {"cell": task.cell.name, "seed": task.seed, "finished": task.folder.summary.exists()}
        if line["finished"]:
            line |= json.loads(task.folder.summary.read_text())
        lines.append(json.dumps(line))
    (out / "results.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
