"""Train the runs of an ablation, several at a time, each in its own process."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from moe.ablation.ablation_folder import AblationFolder, try_lock
from moe.ablation.cells import Cell
from moe.runs.metrics_log import read_metrics
from moe.runs.run_folder import RunFolder
from moe.tables import duration

PROGRESS_SECONDS = 60


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and SIGTERM, also in a background job that ignores SIGINT."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = {name: signal.signal(name, interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


@dataclass(frozen=True)
class Conditions:
    """What a run runs under, whether it is trained or measured."""

    start: Sequence[str]  # starts Python, perhaps by a launcher
    jobs: int  # runs side by side
    threads: int | None  # of each run; None leaves their number to the environment

    def environment(self) -> dict[str, str]:
        """The environment variables of a run."""
        return {**os.environ, **({} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)})}


@dataclass(frozen=True, eq=False)
class Task:
    """One cell with one seed: an ordinary run of train.py."""

    cell: Cell
    seed: int
    folder: RunFolder

    @property
    def name(self) -> str:
        """The name shown in messages."""
        return f"{self.cell.name},seed={self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete."""
        return self.folder.summary.exists()

    @property
    def step(self) -> int:
        """The last logged step, 0 if there is none."""
        metrics = read_metrics(self.folder.metrics)
        return metrics[-1]["step"] if metrics else 0

    def work(self, step: int) -> float:
        """The work of the first `step` steps: seconds in a race by the clock, else FLOPs."""
        config = self.cell.config
        if self.cell.step_time is not None:
            return step * self.cell.step_time.seconds
        tokens = config.train.global_batch_size * config.data.seq_len
        return step * tokens * self.cell.counts.flops_per_token_train


class _Process(NamedTuple):
    """A running run."""

    process: "subprocess.Popen[bytes]"
    started: float  # by time.perf_counter()
    first_step: int  # that it resumed from


class AblationRunner:
    """Trains the runs of an ablation, some at a time, and records their results in its folder.

    The configuration and the keys `run.*` are the arguments of train.py.
    """

    def __init__(self, folder: AblationFolder, tasks: list[Task], train: Path, conditions: Conditions):
        self._folder, self._tasks, self._jobs = folder, tasks, conditions.jobs
        self._command = [*conditions.start, str(train)]
        self._environment = {"WANDB_RUN_GROUP": folder.path.resolve().name} | conditions.environment()
        self._started, self._work_before = time.perf_counter(), self._work()
        self._stopping = False
        self._running: dict[Task, _Process] = {}
        self._exit_codes: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Train all unfinished runs. On any exception, let the running ones save and wait for them."""
        missing = [task for task in self._tasks if not task.is_finished]
        print(f"{len(self._tasks) - len(missing)} of {len(self._tasks)} runs are finished", flush=True)
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                futures = [pool.submit(self._train, task) for task in missing]
                try:
                    while wait(futures, PROGRESS_SECONDS).not_done:
                        print(self._progress(), flush=True)
                except BaseException:
                    self._stop()
                    pool.shutdown(cancel_futures=True)
                    raise
            for future in futures:
                future.result()
        finally:
            self._folder.write_results(self._exit_codes)

    def _train(self, task: Task) -> None:
        """Train one run to its end. Its output goes to its log."""
        name, seed = task.cell.name, task.seed
        path = str(task.folder.path).replace("'", "''")  # as in YAML
        run = [f"run.dir='{path}'", f"run.name={name.replace('=', '-').replace(',', '.')}.seed-{seed}"]
        run += [f"run.seed={seed}", "run.resume=auto"]
        with self._folder.log(name, seed).open("ab") as log:
            self._wait_for_orphan(log, task)
            started = time.perf_counter()
            with self._lock:
                if self._stopping or task.is_finished:
                    return
                command = [*self._command, str(self._folder.config(name)), *run]
                process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
                self._running[task] = _Process(process, started, task.step)
            code = process.wait()
        with self._lock:
            del self._running[task]
            self._exit_codes[name, seed] = code
            if not self._stopping:
                outcome = "done" if task.is_finished else f"FAILED with exit code {code}, see {log.name}"
                print(f"{task.name}: {outcome} after {time.perf_counter() - started:,.0f} s", flush=True)
                self._folder.write_results(self._exit_codes)

    def _wait_for_orphan(self, log: IO[bytes], task: Task) -> None:
        """Wait for a run that outlived a killed ablation: it still holds the lock of its log."""
        is_announced = False
        while not self._stopping and not try_lock(log.fileno()):
            if not is_announced:
                print(f"{task.name}: waiting for another process that is training it", flush=True)
            is_announced = True
            time.sleep(0.5)

    def _progress(self) -> str:
        """Share of the work that is done, time left, and the steps of the running runs."""
        with self._lock:
            running = dict(self._running)
        total, done = sum(task.work(task.cell.config.train.steps) for task in self._tasks), self._work()
        speed = (done - self._work_before) / (time.perf_counter() - self._started)
        left = f", about {duration((total - done) / speed)} left" if speed > 0 else ""
        return f"{done / total:.0%}{left}; {'; '.join(map(_steps_of, running, running.values()))}"

    def _stop(self) -> None:
        """Tell the runs to save and stop, and start no more."""
        self._stopping = True
        with self._lock:
            for running in self._running.values():
                running.process.send_signal(signal.SIGTERM)

    def _work(self) -> float:
        return sum(task.work(task.step) for task in self._tasks)


def _steps_of(task: Task, running: _Process) -> str:
    """How far a run is, and how long it still takes."""
    step, steps = task.step, task.cell.config.train.steps
    text = f"{task.name} {step:,}/{steps:,}"
    if step <= running.first_step:
        return text
    seconds = (time.perf_counter() - running.started) / (step - running.first_step)
    return f"{text}, {tqdm.format_interval(round(seconds * (steps - step)))} left"
