"""Files that someone planted: nothing is executed, and nothing outside of the folder is touched."""

import contextlib
import ctypes
import os
import pickle

import pytest
import torch

from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.reading import newest_checkpoint
from moe.checkpoint.saving import set_aside_newer
from tests.support.checkpoints import (
    KINDS,
    SHAPES,
    link_outside,
    make_state,
    name_a_file_outside,
    names_in,
    newest,
    outside_of,
    resign,
    save,
    shard_of,
)

pytestmark = pytest.mark.usefixtures("four_elements_to_a_shard")


@contextlib.contextmanager
def untouched(folder):
    """Fails if anything opens, reads, writes, makes or deletes anything in a folder; the kernel watches."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    all_events = 0xFFF
    assert libc.inotify_add_watch(watch, os.fsencode(folder), all_events) >= 0
    try:
        yield
        with pytest.raises(BlockingIOError):
            pytest.fail(f"something touched it: {os.read(watch, 4096)}")
    finally:
        os.close(watch)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_the_watch_sees_one_opened_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(pytest.fail.Exception, match="touched"), untouched(tmp_path):
        (tmp_path / "file").open().close()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("signed_again", [False, True])
@pytest.mark.parametrize("file", ["weights.pt", "data.pkl", "00009-00000.safetensors", "a shard"])
def test_a_planted_pickle_is_never_executed(tmp_path, file, signed_again):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = save(tmp_path / "checkpoints", 1)
    planted = shard_of(path) if file == "a shard" else path / file
    planted.write_bytes(pickle.dumps(Bomb(outside / "executed")))
    if signed_again:
        resign(path, lambda manifest: manifest["shards"].setdefault(planted.name, {}))
    with untouched(outside):
        checkpoint, warnings = newest_checkpoint(tmp_path / "checkpoints")
        if checkpoint is None:
            assert "step-00000001 is damaged" in warnings[0]
        else:
            assert signed_again
            readable = {(kind, name) for kind in KINDS for name in SHAPES}
            if file == "a shard":
                with pytest.raises(CheckpointError, match=rf"{planted.name}: weights/a.weight"):
                    checkpoint.read("weights", "a.weight")
                readable.remove(("weights", "a.weight"))
            for kind, name in readable:
                assert torch.equal(checkpoint.read(kind, name), make_state(1)[kind][name])
        save(tmp_path / "checkpoints", 2, keep=1)
    assert names_in(tmp_path / "checkpoints") == ["step-00000002"]


POINTING_OUTSIDE = {
    "hostile file name": name_a_file_outside,
    "shard a link": lambda path: link_outside(path, shard_of(path)),
    "manifest a link": lambda path: link_outside(path, path / "manifest.json"),
}


@pytest.mark.parametrize("harm", POINTING_OUTSIDE)
def test_a_checkpoint_that_points_outside_is_refused_before_anything_there_is_read(tmp_path, harm):
    path = save(tmp_path / "checkpoints", 1)
    POINTING_OUTSIDE[harm](path)
    with untouched(outside_of(path)):
        assert newest_checkpoint(tmp_path / "checkpoints")[0] is None
        set_aside_newer(tmp_path / "checkpoints", 0)
        save(tmp_path / "checkpoints", 1, keep=1)
        set_aside_newer(tmp_path / "checkpoints", 0)
        save(tmp_path / "checkpoints", 1, keep=1)
        assert newest(tmp_path / "checkpoints")[0].step == 1


def test_links_in_the_place_of_checkpoints_are_not_followed(tmp_path):
    """One sound checkpoint outside; each name that a save lists, cleans or replaces is a link to it."""
    outside = save(tmp_path / "elsewhere", 99)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    links = ("step-00000099", ".step-00000003.partial", ".step-00000001.removed", "damaged-step-00000004")
    for name in links:
        (folder / name).symlink_to(outside)
    with untouched(outside):
        assert newest_checkpoint(folder) == (None, [])
        save(folder, 3)
        assert newest(folder)[0].step == 3
        assert names_in(folder) == ["damaged-step-00000004", "step-00000003", "step-00000099"]
        save(folder, 4, keep=1)
        assert names_in(folder) == ["damaged-step-00000004", "step-00000004", "step-00000099"]


@pytest.mark.parametrize("target", ["outside", "nowhere"])
def test_a_link_in_the_way_of_a_checkpoint_or_of_a_damaged_one_makes_way(tmp_path, target):
    folder, outside = tmp_path / "checkpoints", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "precious").write_text("x")
    for name in ("step-00000002", "damaged-step-00000002"):
        (folder / name).symlink_to(tmp_path / target)
    with untouched(outside):
        save(folder, 1)
        save(folder, 2)
        assert newest(folder)[0].step == 2
        set_aside_newer(folder, 1)
    assert [name for name in names_in(folder) if not name.startswith("damaged")] == ["step-00000001"]
    assert len(list(folder.glob("damaged-step-00000002-*"))) == 1
