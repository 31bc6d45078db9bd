"""Which checkpoints a run has, by the names of their folders. Nothing here imports torch."""

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step; `_NAME` reads the step back."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    found = [(match, path) for path in entries if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)
