"""Of the processes that need the same tokens, one makes them and the others wait."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moe.config import ConfigError


@contextmanager
def alone(cache: Path, name: str, timeout_s: float) -> Iterator[None]:
    """One process per file system at a time does what has this name.

    Args:
        cache: the folder that the processes share.
        name: of what is done.
        timeout_s: how long to wait for the others.

    Raises:
        ConfigError: the time is over, or the folder cannot be written.
    """
    try:
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / "locks" / name)
        try:
            lock.acquire(timeout=min(5, timeout_s))
        except Timeout:
            print("waiting for another process that prepares the same text", file=sys.stderr)
            lock.acquire(timeout=timeout_s)
    except Timeout:
        problem = f"another process has been preparing the same text for {timeout_s:g} s"
        raise ConfigError("data.cache_timeout_s", f"{problem}; wait for it, or stop it") from None
    except OSError as error:
        raise ConfigError("data.cache_dir", f"cannot write to {cache} ({error.strerror})") from None
    try:
        yield
    finally:
        lock.release()
