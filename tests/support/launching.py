"""Start train.py in processes of its own, under launchers and without, and leave none of them running."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.support.paths import ROOT, TRAIN

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO_RANKS = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
DEEPSPEED = [sys.executable, str(Path(sys.executable).with_name("deepspeed"))]


def free_port() -> str:
    """Below the ports that the system hands out, which any connection may take before we do."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)) != 0:
                return str(port)


@contextmanager
def stopped_at_the_end(*processes: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill these processes and all that they started, if they still run then."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                root = psutil.Process(process.pid)
                for each in [*root.children(recursive=True), root]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                process.wait()


class Job(NamedTuple):
    """A launcher with its two ranks; all of their output goes to one file."""

    process: subprocess.Popen[bytes]
    run: Path
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def ranks(self) -> dict[int, psutil.Process]:
        found: dict[int, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                rank = process.environ().get("RANK")
                if rank is not None and str(TRAIN) in process.cmdline():
                    found[int(rank)] = process
        assert found.keys() == {0, 1}, self.output()
        return found

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, f"{what}?\n{self.output()}"
            time.sleep(0.001)

    def ended_within(self, seconds: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None


@contextmanager
def launched(launcher: list[str], arguments: list[str], run: Path, **environment: str) -> Iterator[Job]:
    """Train under a launcher, one thread a rank, as sums depend on their number."""
    log = run.with_name(f"{run.name}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launcher, str(TRAIN), *arguments, f"run.dir={run}"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    with stopped_at_the_end(process):
        yield Job(process, run, log)
