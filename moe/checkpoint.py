"""Save and load training state: safetensors and JSON only, so that loading one never executes code.

A checkpoint is a folder `step-%08d` with one safetensors file per kind of tensor (`weights`, `exp_avg`,
`exp_avg_sq`, `rng`), its tensors under the parameters' names, and `manifest.json` with the step, the
configuration and each file's SHA-256. It is written under a hidden name and renamed, so a reader sees all of
it or nothing.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
KINDS = ("weights", "exp_avg", "exp_avg_sq", "rng")
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(Exception):
    """A checkpoint is damaged or does not fit; the message says which file or tensor, and how."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Attributes:
        path: its folder.
        step: optimizer steps taken when it was saved.
        kinds: kinds of tensor in it.
        info: what the writer put in beside the tensors: the configuration, the data's fingerprint.
    """

    path: Path
    step: int
    kinds: tuple[str, ...]
    info: dict[str, Any]

    def read(self, kind: str) -> dict[str, Tensor]:
        """Tensors of one kind by parameter name, on CPU, fp32 (`rng`: uint8)."""
        return load_file(self.path / f"{kind}.safetensors")


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], info: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-%08d`, then delete all but the newest `keep`.

    Args:
        folder: the run's `checkpoints/`.
        step: optimizer steps taken.
        tensors: kind -> name -> tensor.
        info: JSON values to keep beside them.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: a tensor is not finite; nothing was written.
    """
    final = folder / f"step-{step:08d}"
    scratch = folder / f".{final.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    for kind, named in tensors.items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CheckpointError(f"{kind} of {name} at step {step} are not finite and were not saved")
    scratch.mkdir(parents=True)
    files = {}
    for kind, named in tensors.items():
        path = scratch / f"{kind}.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, path)
        _flush(path)
        files[path.name] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    manifest = {"format": FORMAT, "step": step, "files": files, "info": info}
    (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _flush(scratch / "manifest.json")
    if final.exists():
        _remove(final)
    scratch.rename(final)
    _flush(folder)
    for _, old in _list(folder)[keep:]:
        _remove(old)
    return final


def has_checkpoint(folder: Path) -> bool:
    """Whether there is any complete-looking checkpoint, damaged or not."""
    return bool(_list(folder))


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose checksums hold, and one warning for each newer one that is damaged."""
    warnings = []
    for step, path in _list(folder):
        try:
            manifest = _verify(path, step)
            kinds = tuple(name.removesuffix(".safetensors") for name in manifest["files"])
            return Checkpoint(path, step, kinds, manifest["info"]), warnings
        except CheckpointError as error:
            warnings.append(f"checkpoint {path} is damaged ({error}); trying the one before")
    return None, warnings


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints past `step`, which are damaged, so that the run can write those steps again."""
    for newer_step, path in _list(folder):
        if newer_step > step:
            shutil.rmtree(folder / f"damaged-{path.name}", ignore_errors=True)
            path.rename(folder / f"damaged-{path.name}")


def check_names(expected: Mapping[str, Any], found: Mapping[str, Tensor], kind: str) -> None:
    """Refuse tensors that are missing, unexpected or of another shape.

    Raises:
        CheckpointError: naming the first few.
    """
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(f"{kind}: missing {missing[:3]}, unexpected {extra[:3]}")
    for name, tensor in found.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            raise CheckpointError(
                f"{kind}: {name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            )


def _verify(path: Path, step: int) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT or manifest["step"] != step:
            raise CheckpointError(f"manifest.json is of format {manifest['format']}, step {manifest['step']}")
        for name, entry in manifest["files"].items():
            if Path(name).name != name:
                raise CheckpointError(f"manifest.json names a file outside the folder: {name!r}")
            if _sha256(path / name) != entry["sha256"]:
                raise CheckpointError(f"{name} does not match its checksum")
        missing = {f"{kind}.safetensors" for kind in KINDS} - manifest["files"].keys()
        if missing:
            raise CheckpointError(f"manifest.json lacks {', '.join(sorted(missing))}")
        if not isinstance(manifest["info"], dict):
            raise CheckpointError("manifest.json has no info")
        return manifest
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"manifest.json cannot be read ({error})") from None


def _list(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; a reader that comes in between sees none rather than half of one."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
