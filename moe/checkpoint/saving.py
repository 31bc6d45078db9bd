"""Save and load training state on any topology: safetensors and JSON only, so that loading executes no code.

A checkpoint is a folder `step-%08d` of safetensors shards and `manifest.json`. Every tensor of the state (a
kind and a parameter's name, experts stacked by global id) is flattened and stored once, in fragments: each
rank writes those it owns, and the manifest says which elements lie in which shard. So a reader of any
topology finds the elements it holds, and no rank ever holds the whole model. The folder is written under a
hidden name, and renamed when all ranks are done: readers see all of it or nothing.
"""

import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.checkpoint import manifest as manifests
from moe.checkpoint.manifest import CheckpointError, Manifest, Piece, Shard, TensorEntry, Written

_SHARD_BYTES = 2**28  # a GPU rank copies this much to the host at a time, or one fragment where that is more
_READ_ELEMENTS = 2**20  # of a shard that are in memory beside the tensor that is read
_NAME = re.compile(r"step-(\d{8})")
_Result = TypeVar("_Result")


class Fragment(NamedTuple):
    """Consecutive elements of one flattened tensor of the training state.

    Attributes:
        kind: `weights`, `exp_avg` or `exp_avg_sq`.
        name: of the parameter.
        shape: of the whole tensor, over all ranks.
        start: place of the first element in the whole tensor, flattened.
        values: (n,) fp32, on any device.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose manifest has been read.

    Attributes:
        path: its folder.
        step: optimizer steps taken when it was saved.
        config: of the run that saved it.
        info: what the writer put in beside the tensors: the data's fingerprint, the seconds so far.
        tensors: kind -> name -> where its elements are.
    """

    path: Path
    step: int
    config: dict[str, Any]
    info: dict[str, Any]
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
                raise CheckpointError(
                    f"{self.path}: {kind}: {name} is {tuple(found[name].shape)}, not {tuple(shape)}"
                )

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
            self._opened[shard] = safe_open(self.path / shard, "pt", backend="pread")
        return self._opened[shard]


def save_checkpoint(
    folder: Path,
    step: int,
    fragments: Iterable[Fragment],
    config: dict[str, Any],
    info: dict[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-%08d` together with all other ranks, then delete all but the newest `keep`.

    Every rank calls this. Either all of them return and the checkpoint is complete, or all raise and it does
    not exist.

    Args:
        folder: the run's `checkpoints/`, on a file system that all ranks share.
        step: optimizer steps taken.
        fragments: what this rank owns; over all ranks, each element of the state once.
        config: of the run.
        info: JSON values to keep beside the tensors.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: a tensor is not finite, or a rank could not write.
    """
    final = folder / f"step-{step:08d}"
    scratch = folder / f".{final.name}.partial"
    rank, _ = _rank_and_size()
    on_all_ranks(lambda: _clear(scratch) if rank == 0 else None)
    written = on_all_ranks(lambda: _write_shards(scratch, rank, fragments))

    def publish() -> None:
        if rank == 0:
            _publish(scratch, final, manifests.merge(step, config, info, written))
            for _, old in _list(folder)[keep:]:
                with suppress(OSError):  # the new one is complete, and the next save tries again
                    _remove(old)

    on_all_ranks(publish)
    return final


def open_checkpoint(folder: Path, step: int, check_content: bool) -> Checkpoint:
    """Read and check a manifest.

    Args:
        folder: the run's `checkpoints/`.
        step: which one.
        check_content: also compare the shards with their checksums; where there are several ranks, each a
            share of them.

    Raises:
        CheckpointError: it is damaged.
        OSError: the file system fails.
    """
    path = folder / f"step-{step:08d}"
    try:
        manifest = manifests.read_manifest(path / "manifest.json")
        if manifest.step != step:
            raise CheckpointError(f"manifest.json is of step {manifest.step}")
        manifests.check_shards(path, manifest)
        manifests.check_pieces(manifest)
        if check_content:
            manifests.check_content(path, manifest, *_rank_and_size())
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from None
    return Checkpoint(path, step, manifest.config, manifest.info, manifest.tensors)


def newest_checkpoint(folder: Path, check_content: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is not damaged, and one warning for each newer one that is.

    Where there are several ranks, all of them call this and come to the same answer.

    Raises:
        CheckpointError: the file system fails.
    """
    opened: dict[int, Checkpoint] = {}
    warnings = []

    def problem_with(step: int) -> str:
        try:
            opened[step] = open_checkpoint(folder, step, check_content)
        except CheckpointError as error:
            return str(error)
        return ""

    steps = on_all_ranks(lambda: [step for step, _ in _list(folder)])[0]
    for step in steps:
        problems = [problem for problem in on_all_ranks(partial(problem_with, step)) if problem]
        if not problems:
            return opened[step], warnings
        path = folder / f"step-{step:08d}"
        warnings.append(f"checkpoint {path} is damaged ({problems[0]}); trying the one before")
    return None, warnings


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints past `step`, which are damaged, so that the run can write those steps again."""
    for newer_step, path in _list(folder):
        if newer_step > step:
            damaged = folder / f"damaged-{path.name}"
            taken = damaged.is_symlink() or damaged.exists()
            path.rename(folder / f"damaged-{path.name}-{time.time_ns()}" if taken else damaged)


def on_all_ranks(action: Callable[[], _Result]) -> list[_Result]:
    """Run one's own part; the results of all ranks, or one error on all of them if it failed on any."""
    result, error = None, None
    try:
        result = action()
    except (OSError, RuntimeError, ValueError, CheckpointError, SafetensorError) as failure:
        error = str(failure)
    outcomes: list[Any] = [(result, error)]
    if _rank_and_size()[1] > 1:
        outcomes = [None] * _rank_and_size()[1]
        torch.distributed.all_gather_object(outcomes, (result, error))
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            raise CheckpointError(f"rank {rank}: {error}" if len(outcomes) > 1 else error)
    return [result for result, _ in outcomes]


def _rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _clear(scratch: Path) -> None:
    """Make an empty folder, and remove what killed runs left half done."""
    for left_over in scratch.parent.glob(".step-*"):
        with suppress(OSError):
            _delete(left_over)
    scratch.mkdir(parents=True)


def _write_shards(scratch: Path, rank: int, fragments: Iterable[Fragment]) -> Written:
    written = Written({}, [])
    batch: dict[str, Tensor] = {}
    batch_bytes = 0

    def name() -> str:
        return f"{rank:05d}-{len(written.shards):05d}.safetensors"

    def flush() -> None:
        path = scratch / name()
        save_file(batch, path)
        _flush(path)
        written.shards[path.name] = Shard(sha256=manifests.sha256_of(path), bytes=path.stat().st_size)
        batch.clear()

    for kind, tensor_name, shape, start, values in fragments:
        if not values.isfinite().all():
            raise CheckpointError(f"{kind} of {tensor_name} are not finite and were not saved")
        key = f"{kind}/{tensor_name}"
        if key in batch or (batch and batch_bytes + values.nbytes > _SHARD_BYTES):
            flush()
            batch_bytes = 0
        batch[key] = values.detach().cpu()
        batch_bytes += values.nbytes
        piece = Piece(shard=name(), start=start, numel=values.numel())
        written.places.append((kind, tensor_name, list(shape), piece))
    if batch:
        flush()
    return written


def _publish(scratch: Path, final: Path, manifest: Manifest) -> None:
    manifests.check_shards(
        scratch, manifest
    )  # a rank may have written to a file system that this one does not see
    manifests.check_pieces(manifest)
    manifests.write_manifest(scratch / "manifest.json", manifest)
    _flush(scratch / "manifest.json")
    _flush(scratch)
    if final.is_symlink() or final.exists():
        _remove(final)
    scratch.rename(final)
    _flush(final.parent)


def _list(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of complete checkpoints, newest first."""
    if not folder.is_dir():
        return []
    entries = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    found = [(match, path) for path in entries if (match := _NAME.fullmatch(path.name))]
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint; a reader that comes in between sees none rather than half of one."""
    hidden = path.with_name(f".{path.name}.removed")
    path.rename(hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    """Delete a folder, or a link that someone put in its place."""
    path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
