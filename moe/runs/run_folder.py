"""The folder of a run: where each of its files lies."""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe.config import Config, ConfigError, dump_config


class RunFolder:
    """Paths of one run.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"  # complete, with every default filled in
        self.environment = path / "env.json"  # code version, library versions and hardware
        self.metrics = path / "metrics.jsonl"  # one JSON object a line
        self.summary = path / "summary.json"  # final figures; it exists once the run is finished
        self.loss_plot = path / "loss.png"  # training and validation loss
        self.router_plot = path / "router.png"  # what the routers did; not of a dense model
        self.sample = path / "sample.txt"  # text from the final model
        self.tokenizer = path / "tokenizer.json"  # in the format of the `tokenizers` library
        self.checkpoints = path / "checkpoints"  # a folder per checkpoint
        self.failure = path / "failure.txt"  # why the run failed; it exists until the run goes on
        self.compile_log = path / "compile.log"  # the traceback of a torch.compile that failed
        self._lock = path / "run.lock"  # locked by the process that trains

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Lock the folder while these ranks train. The system removes the lock when rank 0 ends.

        What was read of the folder before may be outdated: another process may have trained meanwhile.

        Raises:
            ConfigError: another process trains.
        """
        from moe.distributed.agreement import on_all_ranks, rank_and_size  # with torch, which runs.py spares

        lock = FileLock(self._lock)

        def acquire() -> bool:
            if rank_and_size()[0] == 0:
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire(timeout=5)  # not at once, since `is_in_use` locks for a moment
                except Timeout:
                    return False
            return True

        if not all(on_all_ranks(acquire)):
            raise self.in_use_error()
        try:
            yield
        finally:
            lock.release()

    def is_in_use(self) -> bool:
        """Whether a process trains, on this machine or on another one that shares the folder."""
        if not self._lock.exists():
            return False
        with self._lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def is_empty(self) -> bool:
        """Whether nothing is in it but a lock, which a run that never began leaves behind."""
        return not self.path.exists() or not set(self.path.iterdir()) - {self._lock}

    def in_use_error(self) -> ConfigError:
        """The error for a second process that would train."""
        problem = f"{self.path} is being trained by another process"
        return ConfigError("run.name", f"{problem}; wait for it, stop it, or choose another run.name")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json` atomically."""
        scratch = self.summary.with_suffix(".partial")
        scratch.write_text(json.dumps(summary, indent=1))
        scratch.replace(self.summary)

    def create(self, config: Config) -> None:
        """Make the folder, write the configuration, and remove the results of an earlier, shorter run.

        Raises:
            ConfigError: the file system refuses.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.config.write_text(dump_config(config))
            for result in (self.summary, self.loss_plot, self.sample, self.failure, self.compile_log):
                result.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError("run.dir", f"cannot write to {self.path} ({error.strerror})") from None
