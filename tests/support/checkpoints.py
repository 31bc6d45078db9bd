"""Checkpoints of a tiny state, read without our reader, and damaged or forged."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from moe.checkpoint.manifest import Info
from moe.checkpoint.reading import Checkpoint, newest_checkpoint
from moe.checkpoint.saving import Fragment, Save, save_checkpoint

State = dict[str, dict[str, Tensor]]  # kind -> name -> tensor
KINDS = ("weights", "exp_avg", "exp_avg_sq")
SHAPES = {"a.weight": (2, 3), "b.weight": (2,)}


def make_state(value: float) -> State:
    """a.weight is [[0, 1, 2], [3, 4, 5]] + value, b.weight its first two; the moments, 2 and 3 times that."""
    base = torch.arange(6, dtype=torch.float32) + value
    return {kind: {"a.weight": base * i, "b.weight": base[:2] * i} for i, kind in enumerate(KINDS, 1)}


def fragments(state: State, length: int = 4) -> Iterator[Fragment]:
    """The state in pieces of at most `length` elements."""
    for kind, named in state.items():
        for name, values in named.items():
            for start in range(0, len(values), length):
                yield Fragment(kind, name, SHAPES[name], start, values[start : start + length])


def save(folder: Path, step: int, keep: int = 5) -> Path:
    """A checkpoint of `make_state(step)`."""
    save = Save(folder, step, {"run": {"seed": 3}}, Info(wall_s=step), keep)
    return save_checkpoint(save, fragments(make_state(step)))


def whole_tensors(path: Path) -> State:
    """Kind -> name -> tensor of its full shape, from the files alone."""
    manifest = json.loads((path / "manifest.json").read_text())
    shards = {name: load_file(path / name) for name in manifest["shards"]}
    whole: State = {}
    for kind, named in manifest["tensors"].items():
        for name, entry in named.items():
            pieces = sorted(entry["pieces"], key=lambda piece: piece["start"])
            parts = [shards[piece["shard"]][f"{kind}/{name}"] for piece in pieces]
            assert [len(part) for part in parts] == [piece["numel"] for piece in pieces]
            whole.setdefault(kind, {})[name] = torch.cat(parts).view(entry["shape"])
    return whole


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest undamaged checkpoint, which there must be, and the warnings."""
    checkpoint, warnings = newest_checkpoint(folder)
    assert checkpoint is not None, warnings
    return checkpoint, warnings


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def shard_of(path: Path, kind: str = "weights", name: str = "a.weight") -> Path:
    """The file that holds the first piece of a tensor."""
    manifest = json.loads((path / "manifest.json").read_text())
    return path / manifest["tensors"][kind][name]["pieces"][0]["shard"]


def flip_a_bit(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def resign(path: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change the manifest as someone would who knows its format, with all checksums right."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    for name, shard in manifest["shards"].items():
        if (path / name).is_file():
            content = (path / name).read_bytes()
            shard |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}))


def outside_of(path: Path) -> Path:
    """A folder beside that of the checkpoints."""
    folder = path.parent.parent / "outside"
    folder.mkdir(exist_ok=True)
    return folder


def name_a_file_outside(path: Path) -> None:
    """A sound file with the right checksum, but not this checkpoint's."""
    shard, hostile = shard_of(path), "../../outside/sound.safetensors"
    shutil.copy(shard, outside_of(path) / "sound.safetensors")

    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][hostile] = manifest["shards"].pop(shard.name)
        manifest["tensors"]["weights"]["a.weight"]["pieces"][0]["shard"] = hostile

    shard.unlink()
    resign(path, change)


def link_outside(path: Path, file: Path) -> None:
    """Put a link in the place of a file of the checkpoint."""
    shutil.copy(file, outside_of(path) / file.name)
    file.unlink()
    file.symlink_to(outside_of(path) / file.name)
