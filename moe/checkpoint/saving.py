"""Save training state so that any topology can read it, and so that a reader sees all of it or nothing.

A checkpoint is a folder `step-%08d` of safetensors shards and `manifest.json`. Every tensor of the state (a
kind and a parameter's name, experts stacked by global id) is flattened and stored once, in fragments: each
rank writes the fragments it owns, and the manifest says which elements lie in which shard. So no rank ever
holds the whole model. The folder is written under a hidden name, and renamed when all ranks are done.
"""

import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe.checkpoint import manifest as manifests
from moe.checkpoint.listing import checkpoint_path, list_checkpoints
from moe.checkpoint.manifest import CheckpointError, Info, Manifest, Piece, Shard, Written
from moe.distributed.agreement import on_all_ranks, rank_and_size

_SHARD_BYTES = 2**28  # a GPU rank copies this much to the host at a time; a larger fragment is a shard alone


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


class Save:
    """A checkpoint in the making: `begin`, `write` and `publish`, in this order.

    Args:
        folder: the run's `checkpoints/`, on a file system that all ranks share.
        step: optimizer steps taken.
        config: of the run.
        info: stored with the tensors.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, step: int, config: dict[str, Any], info: Info, keep: int):
        self._folder, self._step, self._config, self._info, self._keep = folder, step, config, info, keep
        self.path = checkpoint_path(folder, step)
        self._scratch = folder / f".{self.path.name}.partial"
        self._rank, _ = rank_and_size()

    def begin(self) -> None:
        """Make an empty hidden folder. All ranks call it together."""
        on_all_ranks(lambda: _clear(self._scratch) if self._rank == 0 else None)

    def write(self, fragments: Iterable[Fragment]) -> Written:
        """Write this rank's fragments; over all ranks, each element of the state has to come once.

        Raises:
            CheckpointError: a tensor is not finite, or a file cannot be written.
        """
        return _write_shards(self._scratch, self._rank, fragments)

    def publish(self, written: list[Written]) -> None:
        """Give the folder its name, then delete all but the newest `keep`. All ranks call it together.

        Args:
            written: what `write` returned on each rank.

        Raises:
            RunError: the checkpoint has a gap, or rank 0 cannot write.
        """

        def of_rank_0() -> None:
            if self._rank == 0:
                manifest = manifests.merge(self._step, self._config, self._info, written)
                _publish(self._scratch, self.path, manifest)
                for _, old in list_checkpoints(self._folder)[self._keep :]:
                    with suppress(OSError):  # the new one is complete, and the next save tries again
                        _remove(old)

        on_all_ranks(of_rank_0)


def save_checkpoint(save: Save, fragments: Iterable[Fragment]) -> Path:
    """Save together with all other ranks, and wait for it. A reader sees the complete checkpoint or none.

    Args:
        save: the same on all ranks.
        fragments: what this rank owns; over all ranks, each element of the state once.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: a tensor is not finite, or a rank could not write.
    """
    save.begin()
    save.publish(on_all_ranks(lambda: save.write(fragments)))
    return save.path


def set_aside_newer(folder: Path, step: int) -> None:
    """Rename checkpoints past `step`, which are damaged, so that the run can write those steps again."""
    for newer_step, path in list_checkpoints(folder):
        if newer_step > step:
            damaged = folder / f"damaged-{path.name}"
            taken = damaged.is_symlink() or damaged.exists()
            path.rename(folder / f"damaged-{path.name}-{time.time_ns()}" if taken else damaged)


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
        try:
            save_file(batch, path)
        except SafetensorError as error:
            raise CheckpointError(f"{path.name} cannot be written ({error})") from None
        _flush(path)
        written.shards[path.name] = Shard(sha256=manifests.sha256_of(path), bytes=path.stat().st_size)
        batch.clear()

    for kind, tensor_name, shape, start, values in fragments:
        if not values.isfinite().all():
            raise CheckpointError(f"{kind} of {tensor_name} are not finite; the checkpoint was not saved")
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
    manifests.check_shards(scratch, manifest)  # a rank may have written to another file system
    manifests.check_pieces(manifest)
    manifests.write_manifest(scratch / "manifest.json", manifest)
    _flush(scratch / "manifest.json")
    _flush(scratch)
    if final.is_symlink() or final.exists():
        _remove(final)
    scratch.rename(final)
    _flush(final.parent)


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
