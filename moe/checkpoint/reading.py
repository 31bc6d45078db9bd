"""Read checkpoints: find the newest sound one, and read any part of any tensor from it.

Loading executes no code, since a checkpoint holds safetensors and JSON only.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.checkpoint import manifest as manifests
from moe.checkpoint.listing import checkpoint_path, list_checkpoints
from moe.checkpoint.manifest import CheckpointError, Info, TensorEntry
from moe.distributed.agreement import on_all_ranks, rank_and_size

_READ_ELEMENTS = 2**20  # of a shard that are in memory in addition to the tensor that is read
_OPEN_SHARDS = 16  # at a time; a system may allow a process few open files


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read.

    Attributes:
        path: its folder.
        step: optimizer steps taken when it was saved.
        config: of the run that saved it.
        info: what the writer stored with the tensors.
        tensors: kind -> name -> where its elements are.
    """

    path: Path
    step: int
    config: dict[str, Any]
    info: Info
    tensors: dict[str, dict[str, TensorEntry]]
    _opened: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def check_names(self, kind: str, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse tensors that are missing, unexpected or of another shape than `expected`, by name.

        Raises:
            CheckpointError: naming the first few.
        """
        found = self.tensors.get(kind, {})
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        if missing or extra:
            raise CheckpointError(f"{self.path}: {kind}: missing {missing[:3]}, unexpected {extra[:3]}")
        for name, shape in expected.items():
            if tuple(found[name].shape) != tuple(shape):
                shapes = f"{tuple(found[name].shape)}, not {tuple(shape)}"
                raise CheckpointError(f"{self.path}: {kind}: {name} is {shapes}")

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Consecutive elements of a flattened tensor, and nothing else of it, from disk.

        Args:
            kind: of state.
            name: of the parameter.
            start: first element.
            numel: how many. None: all from there.

        Returns:
            (numel,) fp32, on CPU.

        Raises:
            CheckpointError: a shard does not hold what the manifest says.
        """
        tensor = self.tensors[kind][name]
        stop = math.prod(tensor.shape) if numel is None else start + numel
        out = torch.empty(stop - start)
        for piece in tensor.pieces:
            first, last = max(start, piece.start), min(stop, piece.start + piece.numel)
            if first < last:
                try:
                    stored = self._open(piece.shard).get_slice(f"{kind}/{name}")
                    if stored.get_shape() != [piece.numel]:
                        raise RuntimeError(f"has shape {stored.get_shape()}, not [{piece.numel}]")
                    for place in range(first, last, _READ_ELEMENTS):  # a slice is a copy
                        end = min(place + _READ_ELEMENTS, last)
                        out[place - start : end - start] = stored[place - piece.start : end - piece.start]
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise CheckpointError(f"{self.path / piece.shard}: {kind}/{name}: {error}") from None
        return out

    def close(self) -> None:
        """Close the shards: an open file keeps some file systems from deleting its folder."""
        self._opened.clear()

    def _open(self, shard: str) -> Any:
        if shard not in self._opened:
            if len(self._opened) == _OPEN_SHARDS:
                self._opened.pop(next(iter(self._opened)))  # the one that was opened first
            self._opened[shard] = safe_open(self.path / shard, "pt", backend="pread")
        return self._opened[shard]


def open_checkpoint(folder: Path, step: int, check_content: bool) -> Checkpoint:
    """Read and check a manifest.

    Args:
        folder: the run's `checkpoints/`.
        step: which one.
        check_content: also compare the shards with their checksums, each rank a share of them.

    Raises:
        CheckpointError: it is damaged.
        OSError: the file system fails.
    """
    path = checkpoint_path(folder, step)
    try:
        manifest = manifests.read_manifest(path / "manifest.json")
        if manifest.step != step:
            raise CheckpointError(f"manifest.json is of step {manifest.step}")
        manifests.check_shards(path, manifest)
        manifests.check_pieces(manifest)
        if check_content:
            manifests.check_content(path, manifest, *rank_and_size())
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from None
    return Checkpoint(path, step, manifest.config, manifest.info, manifest.tensors)


def newest_checkpoint(folder: Path, check_content: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is not damaged, and one warning for each newer one that is.

    Every rank has to call this, and all get the same answer.

    Raises:
        RunError: the file system fails.
    """
    opened: dict[int, Checkpoint] = {}
    warnings = []

    def problem_with(step: int) -> str:
        try:
            opened[step] = open_checkpoint(folder, step, check_content)
        except CheckpointError as error:
            return str(error)
        return ""

    steps = on_all_ranks(lambda: [step for step, _ in list_checkpoints(folder)])[0]
    for step in steps:
        problems = [problem for problem in on_all_ranks(partial(problem_with, step)) if problem]
        if not problems:
            return opened[step], warnings
        outlook = "there is none before it" if step == steps[-1] else "trying the one before"
        warnings.append(f"checkpoint {checkpoint_path(folder, step)} is damaged ({problems[0]}); {outlook}")
    return None, warnings
