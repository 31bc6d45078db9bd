"""Train the runs of an ablation, some side by side, each in a process of its own."""

import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import Cell
from moe.runs.metrics_log import read_metrics
from moe.runs.run_folder import RunFolder

PROGRESS_SECONDS = 60


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM raise KeyboardInterrupt.

    Also where a shell without job control started this in the background, and had SIGINT ignored.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = {name: signal.signal(name, interrupt) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


@dataclass(frozen=True, eq=False)
class Task:
    """One cell with one seed: an ordinary run of train.py."""

    cell: Cell
    seed: int
    folder: RunFolder

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cell.name},seed={self.seed}"

    @property
    def is_finished(self) -> bool:
        """Nothing is left to train."""
        return self.folder.summary.exists()

    @property
    def step(self) -> int:
        """The last that was logged."""
        metrics = read_metrics(self.folder.metrics)
        return metrics[-1]["step"] if metrics else 0

    def flops(self, step: int) -> float:
        """Of so many steps."""
        train = self.cell.config.train
        tokens = train.global_batch_size * self.cell.config.data.seq_len
        return step * tokens * self.cell.counts.flops_per_token_train


class AblationRunner:
    """Runs, and the record of them.

    Args:
        folder: of the ablation, with its plan written.
        tasks: what this command asks for.
        command: that starts train.py; the configuration and run.* are appended.
        jobs: how many runs go side by side.
        threads: of each run; None: as the environment says.
    """

    def __init__(
        self,
        folder: AblationFolder,
        tasks: Sequence[Task],
        command: list[str],
        jobs: int,
        threads: int | None,
    ):
        self._folder, self._tasks, self._command, self._jobs = folder, tasks, command, jobs
        self._environment = {"WANDB_RUN_GROUP": folder.path.resolve().name} | os.environ
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._started, self._flops_before = time.perf_counter(), self._flops()
        self._stopping = False
        self._running: dict[Task, subprocess.Popen[bytes]] = {}
        self._exit_codes: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Train what is not finished; on any exception, let the runs save and wait for that."""
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
        """One run, to its end; what it prints goes to its log."""
        name, seed = task.cell.name, task.seed
        command = [
            *self._command,
            str(self._folder.config(name)),
            f"run.dir={_quoted(str(task.folder.path))}",
            f"run.name={name.replace('=', '-').replace(',', '.')}.seed-{seed}",
            f"run.seed={seed}",
            "run.resume=auto",
        ]
        with self._folder.log(name, seed).open("ab") as log:
            self._wait_for_orphan(log, task)
            started = time.perf_counter()
            with self._lock:
                if self._stopping or task.is_finished:
                    return
                process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
                self._running[task] = process
            code = process.wait()
        with self._lock:
            del self._running[task]
            self._exit_codes[name, seed] = code
            if not self._stopping:
                outcome = "done" if task.is_finished else f"FAILED with exit code {code}, see {log.name}"
                print(f"{task.name}: {outcome} after {time.perf_counter() - started:,.0f} s", flush=True)
                self._folder.write_results(self._exit_codes)

    def _wait_for_orphan(self, log: IO[bytes], task: Task) -> None:
        """Wait for a run that outlived a killed ablation: it inherited the lock of its log."""
        is_told = False
        while not self._stopping:
            try:
                fcntl.flock(log.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not is_told:
                    print(
                        f"{task.name}: is being trained by another process, which is waited for", flush=True
                    )
                is_told = True
                time.sleep(0.5)

    def _progress(self) -> str:
        """How far the ablation is."""
        with self._lock:
            running = list(self._running)
        total, done = sum(task.flops(task.cell.config.train.steps) for task in self._tasks), self._flops()
        speed = (done - self._flops_before) / (time.perf_counter() - self._started)
        left = f", about {(total - done) / speed / 60:,.0f} minutes left" if speed > 0 else ""
        steps = "; ".join(f"{task.name} {task.step:,}/{task.cell.config.train.steps:,}" for task in running)
        return f"{done / total:.0%}{left}; {steps}"

    def _stop(self) -> None:
        """Let the runs save, and start no more."""
        self._stopping = True
        with self._lock:
            for process in self._running.values():
                process.send_signal(signal.SIGTERM)

    def _flops(self) -> float:
        return sum(task.flops(task.step) for task in self._tasks)


def _quoted(text: str) -> str:
    """Text as YAML that stays this text."""
    return "'" + text.replace("'", "''") + "'"
