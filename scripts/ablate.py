"""Train configurations that differ in settings of the experts at equal active FLOPs, and report them.

python scripts/ablate.py configs/sweep.yaml --vary moe.num_experts=1,2,4,8,16,32 --out sweeps/experts
python scripts/ablate.py configs/sweep.yaml --vary granularity=1,2,4 --out sweeps/granularity --dry-run
"""

import argparse
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from moe.accounting import Ledger, count
from moe.config import Config, ConfigError
from moe.config_io import OneLineParser, dump_config, load_config, parse_config, positive_int
from moe.data.tokenizer import with_vocabulary
from moe.dispatch import LocalDispatcher
from moe.memory import estimate_memory
from moe.ops.grouped_mm import choose_expert_path
from moe.run_folder import RunFolder
from moe.sweep.page import write_report
from moe.sweep.plan import Cell, plan
from moe.tables import align, gib, plain, short
from moe.telemetry import read_metrics
from moe.transformer import Transformer, init_weights

ROOT = Path(__file__).parent.parent
QUICK = 8  # times fewer steps
UPDATE_SECONDS = 7e-9  # of ZeRO's update per parameter, measured on a 33.5M model
PROGRESS_SECONDS = 60


@dataclass(frozen=True, eq=False)
class Task:
    """One cell with one seed: an ordinary run of train.py."""

    cell: Cell
    seed: int
    folder: RunFolder

    @property
    def name(self) -> str:
        """For people and for the log."""
        return f"{self.cell.name},seed={self.seed}"

    @property
    def is_finished(self) -> bool:
        """Nothing is left to train."""
        return self.folder.summary.exists()

    @property
    def step(self) -> int:
        """The last that was logged."""
        metrics = read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []
        return metrics[-1]["step"] if metrics else 0

    def flops(self, step: int) -> float:
        """Of so many steps."""
        config = self.cell.config
        tokens = config.train.global_batch_size * config.data.seq_len
        return step * tokens * self.cell.ledger.flops_per_token_train


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
    parser.add_argument("--quick", action="store_true", help=f"1/{QUICK} of the steps; the trends, roughly")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and train nothing")
    options = parser.parse_intermixed_args(arguments)
    try:
        config, cells, tasks = planned(options)
        is_cpu = not options.launcher and not torch.cuda.is_available()
        print(align(list(table(cells, config, seconds_per_flop(config) if is_cpu else None))))
        tokens = config.train.steps * config.train.global_batch_size * config.data.seq_len
        print(f"{len(tasks)} runs of {short(tokens)} tokens; the time is rough, without evaluation")
        if options.quick:
            print(
                f"quick: 1/{QUICK} of the steps; models far from converged, so neither the size of the "
                "differences nor the order of close cells carries over to the whole training"
            )
        if options.dry_run:
            return 0
        write_plan(options.out, cells, options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return train_all(tasks, options)


def planned(options: argparse.Namespace) -> tuple[Config, list[Cell], list[Task]]:
    """The reference, the cells of the plan, and their runs: a whole curve of one seed before the next seed's.

    Raises:
        ConfigError: something of the command line is impossible.
    """
    path, *overrides = options.items
    config = with_vocabulary(load_config(Path(path), overrides))
    config = shortened(config) if options.quick else config
    if config.moe.is_dense:
        raise ConfigError("moe.num_experts", "the reference should be sparse; give it more than one expert")
    if options.launcher and options.jobs is not None:
        raise ConfigError("--jobs", "runs with --launcher go one after the other; leave one of the two out")
    if options.launcher and shutil.which(shlex.split(options.launcher)[0]) is None:
        raise ConfigError("--launcher", f"there is no command {shlex.split(options.launcher)[0]!r}")
    cells = plan(config, varied(options.vary), options.hold)
    tasks = [
        Task(cell, seed, RunFolder(options.out / "runs" / cell.name / f"seed-{seed}"))
        for seed in numbers("--seeds", options.seeds)
        for cell in cells
    ]
    return config, cells, tasks


def shortened(config: Config) -> Config:
    """The reference with 1/QUICK of the steps, evaluated at the end only."""
    values = config.model_dump(mode="json")
    steps = max(config.train.steps // QUICK, 1)
    values["train"] |= {"steps": steps, "eval_interval": steps, "checkpoint_interval": steps}
    values["optim"]["warmup_steps"] //= QUICK
    return parse_config(values)


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
    fastest = math.inf
    for _ in range(4):  # the first pass loads libraries
        started = time.perf_counter()
        model(tokens).logits.float().logsumexp(2).mean().backward()
        fastest = min(fastest, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return fastest / (tokens.numel() * count(config).flops_per_token_train)


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
    missing = [task for task in tasks if not task.is_finished]
    print(f"{len(tasks) - len(missing)} of {len(tasks)} runs are finished", flush=True)
    sweep = Sweep(tasks, options.out, options.launcher)
    one_at_a_time = options.launcher or torch.cuda.is_available()
    jobs = options.jobs or (1 if one_at_a_time else os.cpu_count())
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = [pool.submit(sweep.train, task) for task in missing]
                while wait(futures, PROGRESS_SECONDS).not_done:
                    print(sweep.progress(), flush=True)
            except KeyboardInterrupt:
                sweep.stop()
                pool.shutdown(cancel_futures=True)
                print("stopped; the same command goes on")
                return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        sweep.write_results()
    if any(task.is_finished for task in tasks):
        for sentence in write_report(options.out):
            print(sentence)
        print(f"see {options.out / 'report.html'}")
    return 1 if any(future.result() for future in futures) else 0


class Sweep:
    """Runs of train.py in processes of their own, and the record of them.

    Args:
        tasks: all of the plan.
        out: folder of the sweep.
        launcher: of each run; empty for plain Python.
    """

    def __init__(self, tasks: list[Task], out: Path, launcher: str):
        self.tasks, self.out = tasks, out
        self._launcher = shlex.split(launcher) or [sys.executable]
        self._started = time.perf_counter()
        self._flops_before = self._flops()
        self._stopping = False
        self._running: dict[Task, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def train(self, task: Task) -> int:
        """One run, to its end; what it prints goes to its log. The exit code."""
        command = [
            *self._launcher,
            str(ROOT / "train.py"),
            str(self.out / "configs" / f"{task.cell.name}.yaml"),
            f"run.dir={task.folder.path}",
            f"run.name={task.cell.name.replace('=', '-').replace(',', '.')}.seed-{task.seed}",
            f"run.seed={task.seed}",
        ]
        # A thread each: runs of several threads on the same cores wait for each other by spinning, and
        # rounding depends on the number of threads.
        environment = {"OMP_NUM_THREADS": "1", "WANDB_RUN_GROUP": self.out.resolve().name} | os.environ
        with (self.out / "logs" / f"{task.name}.log").open("ab") as log:
            # The run inherits the lock with its output. If this sweep is killed and started again, a run that
            # outlived it is waited for.
            while not _locks(log.fileno()) and not self._stopping:
                time.sleep(1)
            started = time.perf_counter()
            with self._lock:
                if self._stopping or task.is_finished:
                    return 0
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                self._running[task] = process
            code = process.wait()
        with self._lock:
            del self._running[task]
        if not self._stopping:
            outcome = "done" if code == 0 else f"FAILED with exit code {code}, see {log.name}"
            print(f"{task.name}: {outcome} after {time.perf_counter() - started:,.0f} s", flush=True)
            self.write_results()
        return code

    def progress(self) -> str:
        """Where the sweep stands."""
        with self._lock:
            running = list(self._running)
        total = sum(task.flops(task.cell.config.train.steps) for task in self.tasks)
        done = self._flops()
        spent = time.perf_counter() - self._started
        speed = (done - self._flops_before) / spent
        left = f", about {(total - done) / speed / 60:,.0f} minutes left" if speed else ""
        steps = "; ".join(f"{task.name} {task.step:,}/{task.cell.config.train.steps:,}" for task in running)
        return f"{done / total:.0%}{left}; {steps}"

    def stop(self) -> None:
        """Let the runs save, and start no more."""
        self._stopping = True
        with self._lock:
            for process in self._running.values():
                process.send_signal(signal.SIGTERM)

    def write_results(self) -> None:
        """`results.jsonl`: a line per run, finished or not, in the order of the plan."""
        lines = []
        for task in self.tasks:
            line = {"cell": task.cell.name, "seed": task.seed, "finished": task.is_finished}
            if line["finished"]:
                line |= json.loads(task.folder.summary.read_text())
            lines.append(json.dumps(line) + "\n")
        with self._lock:
            new = self.out / "results.jsonl.new"
            new.write_text("".join(lines))
            new.replace(self.out / "results.jsonl")

    def _flops(self) -> float:
        return sum(task.flops(task.step) for task in self.tasks)


def _locks(descriptor: int) -> bool:
    """Whether the lock of a file could be taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
