"""Hashes of what files hold, without reading again those that did not change."""

import hashlib
import os
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from moe.config import ConfigError
from moe.data.build_lock import alone

_SETTLED_S = 2.0  # a file that changed this recently may change again without a new time stamp


def content_hash(paths: list[str], names: list[str], cache: Path, timeout_s: float) -> str:
    """Hash of the names and the content of files; of a folder, those of its files.

    Args:
        paths: of the files.
        names: of the files, as they count for the hash.
        cache: a folder that remembers the hash, by the paths, sizes and times of change of the files.
        timeout_s: how long to wait for another process that hashes the same files.

    Raises:
        ConfigError: a file cannot be read, or the time is over.
    """
    try:
        files = [file for path in paths for file in _files_in(path)]
        stats = [os.stat(file) for file in files]
        states = [
            f"{os.path.abspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}"
            for file, stat in zip(files, stats, strict=True)
        ]
        known = cache / "hashes" / hash_of_parts([*names, *states])
        if known.is_file():
            return known.read_text()
        with alone(cache, known.name, timeout_s):
            if known.is_file():
                return known.read_text()
            content = hash_of_parts(chain(names, map(_file_hash, files)))
            if time.time() - max(stat.st_mtime for stat in stats) > _SETTLED_S:
                _remember(known, content)
    except OSError as error:
        raise ConfigError("data.source", f"cannot read {error.filename} ({error.strerror})") from None
    return content


def hash_of_parts(parts: Iterable[str]) -> str:
    """One hash of several texts, whatever they hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode(errors="surrogatepass")).digest())
    return digest.hexdigest()


def _files_in(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return sorted(os.path.join(where, name) for where, _, names in os.walk(path) for name in names)


def _file_hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(known: Path, content: str) -> None:
    """Write it whole or not at all."""
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        scratch = known.with_name(f"{known.name}.{os.getpid()}")
        scratch.write_text(content)
        scratch.replace(known)
    except OSError as error:
        raise ConfigError("data.cache_dir", f"cannot write {known} ({error.strerror})") from None
