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
from moe.checkpoint.manifest import CheckpointError, Info, Manifest, Piece, Shard, Written
from moe.checkpoint.reading import checkpoint_path, list_checkpoints
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


def save_checkpoint(
    folder: Path, step: int, fragments: Iterable[Fragment], config: dict[str, Any], info: Info, keep: int
) -> Path:
    """Write `folder/step-%08d` together with all other ranks, then delete all but the newest `keep`.

    Every rank calls this. A reader sees the complete checkpoint or none.

    Args:
        folder: the run's `checkpoints/`, on a file system that all ranks share.
        step: optimizer steps taken.
        fragments: what this rank owns; over all ranks, each element of the state once.
        config: of the run.
        info: stored with the tensors.
        keep: how many checkpoints stay.

    Raises:
        RunError: a tensor is not finite, or a rank could not write.
    """
    final = checkpoint_path(folder, step)
    scratch = folder / f".{final.name}.partial"
    rank, _ = rank_and_size()
    on_all_ranks(lambda: _clear(scratch) if rank == 0 else None)
    written = on_all_ranks(lambda: _write_shards(scratch, rank, fragments))

    def publish() -> None:
        if rank == 0:
            _publish(scratch, final, manifests.merge(step, config, info, written))
            for _, old in list_checkpoints(folder)[keep:]:
                with suppress(OSError):  # the new one is complete, and the next save tries again
                    _remove(old)

    on_all_ranks(publish)
    return final


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
