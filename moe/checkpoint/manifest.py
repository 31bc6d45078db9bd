"""The manifest of a checkpoint: which elements lie in which shard, and checks that they still do."""

import hashlib
import json
import math
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from moe.config import RunError, first_line

FORMAT = 2
_SHARD_NAME = re.compile(r"\d{5}-\d{5}\.safetensors")
_WRITER_KEYS = ("ep_size", "zero_stage", "precision")


class CheckpointError(RunError):
    """A checkpoint is damaged or does not fit; the message says which file or tensor, and how."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Shard(_Entry):
    """A file of the checkpoint."""

    sha256: str
    bytes: int


class Piece(_Entry):
    """Consecutive elements of a flattened tensor, and the shard that has them."""

    shard: str
    start: int = Field(ge=0)
    numel: int = Field(gt=0)


class TensorEntry(_Entry):
    """A tensor over all ranks, and where its elements are."""

    shape: list[int]
    dtype: Literal["float32"] = "float32"
    pieces: list[Piece]


class Info(_Entry):
    """What a run has to know of its steps so far, in addition to the tensors."""

    data_fingerprint: str = ""  # of the text and its tokens
    wall_s: float = Field(default=0.0, ge=0)  # seconds trained
    device_s: float = Field(default=0.0, ge=0)  # the same, times the devices of each part of the run
    skipped_steps: int = Field(default=0, ge=0)  # steps without an update
    recent_norms: list[float] = []  # of the last updates' gradients, for `optim.skip_norm_above`


class Manifest(_Entry):
    """A checkpoint: `writer` is the topology that wrote it; `tensors` is kind -> name -> entry."""

    format: Literal[2] = FORMAT
    step: int
    seed: int | None
    config: dict[str, Any]
    writer: dict[str, Any]
    info: Info
    shards: dict[str, Shard]
    tensors: dict[str, dict[str, TensorEntry]]


class Written(NamedTuple):
    """What one rank wrote: its shards, and which piece of which tensor (kind, name, shape) lies where."""

    shards: dict[str, Shard]
    places: list[tuple[str, str, list[int], Piece]]


def merge(step: int, config: dict[str, Any], info: Info, written: list[Written]) -> Manifest:
    """One manifest out of what each rank says it wrote."""
    shards: dict[str, Shard] = {}
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for part in written:
        shards |= part.shards
        for kind, name, shape, piece in part.places:
            named = tensors.setdefault(kind, {})
            named.setdefault(name, TensorEntry(shape=shape, pieces=[])).pieces.append(piece)
    parallel = config.get("parallel", {})
    writer = {"world_size": len(written)} | {k: parallel[k] for k in _WRITER_KEYS if k in parallel}
    seed = config.get("run", {}).get("seed")
    return Manifest(
        step=step, seed=seed, config=config, writer=writer, info=info, shards=shards, tensors=tensors
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it with its own checksum."""
    body = manifest.model_dump(mode="json")
    path.write_text(json.dumps(body | {"sha256": _digest(body)}, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read it back.

    Raises:
        CheckpointError: it is damaged.
        OSError: it cannot be read at all.
    """
    _check_plain(path)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.get("format") != FORMAT:
            raise CheckpointError(f"manifest.json is of format {body.get('format')}, not {FORMAT}")
        if body.pop("sha256") != _digest(body):
            raise CheckpointError("manifest.json does not match its checksum")
        return Manifest.model_validate(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"manifest.json cannot be read ({first_line(error)})") from None


def check_shards(path: Path, manifest: Manifest) -> None:
    """The folder holds the shards of the manifest, plain files of the right sizes, and nothing else."""
    for name, shard in manifest.shards.items():
        if not _SHARD_NAME.fullmatch(name):
            raise CheckpointError(f"manifest.json names a file that is not a shard: {name!r}")
        _check_plain(path / name)
        if (size := (path / name).stat().st_size) != shard.bytes:
            raise CheckpointError(f"{name} has {size} bytes instead of {shard.bytes}")
    extra = {entry.name for entry in path.iterdir()} - manifest.shards.keys() - {"manifest.json"}
    if extra:
        raise CheckpointError(f"it holds {sorted(extra)[0]!r}, which manifest.json does not name")


def check_pieces(manifest: Manifest) -> None:
    """Every element of every tensor lies in exactly one shard."""
    for kind, named in manifest.tensors.items():
        for name, tensor in named.items():
            place = 0
            for piece in sorted(tensor.pieces, key=lambda piece: piece.start):
                if piece.shard not in manifest.shards:
                    raise CheckpointError(f"{kind}: {name} is in {piece.shard!r}, which is not a shard")
                if piece.start != place:
                    raise CheckpointError(f"{kind}: {name} has a gap or overlap at element {place}")
                place += piece.numel
            if place != math.prod(tensor.shape):
                raise CheckpointError(f"{kind}: {name} ends at element {place} of {tensor.shape}")


def check_content(path: Path, manifest: Manifest, rank: int, num_ranks: int) -> None:
    """Every shard of this rank's share matches its checksum."""
    names = sorted(manifest.shards)[rank::num_ranks]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, sha256 in zip(names, pool.map(lambda name: sha256_of(path / name), names), strict=True):
            if sha256 != manifest.shards[name].sha256:
                raise CheckpointError(f"{name} does not match its checksum")


def _check_plain(path: Path) -> None:
    """Refuse links, and pipes, which would block their reader."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path.name} is {'a link' if stat.S_ISLNK(mode) else 'no plain file'}")


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Checksum of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
