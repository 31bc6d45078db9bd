"""What is saved is read back, all of it or nothing."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from moe.checkpoint import reading
from moe.checkpoint.manifest import Info
from moe.checkpoint.reading import newest_checkpoint, open_checkpoint
from moe.checkpoint.saving import Fragment, Save, save_checkpoint
from moe.config import RunError
from tests.support.checkpoints import (
    KINDS,
    SHAPES,
    fragments,
    make_state,
    names_in,
    newest,
    save,
    whole_tensors,
)

pytestmark = pytest.mark.usefixtures("four_elements_to_a_shard")


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 7)
    checkpoint, warnings = newest(tmp_path)
    assert (checkpoint.path, checkpoint.step, warnings) == (path, 7, [])
    assert (checkpoint.config, checkpoint.info) == ({"run": {"seed": 3}}, Info(wall_s=7))
    assert checkpoint.tensors.keys() == set(KINDS)
    for kind, named in make_state(7).items():
        assert checkpoint.tensors[kind].keys() == named.keys()
        for name, values in named.items():
            assert torch.equal(checkpoint.read(kind, name), values)


@pytest.mark.parametrize("elements_at_once", [3, 2**20])
def test_any_part_of_a_tensor_is_read_whichever_shards_it_lies_in(tmp_path, monkeypatch, elements_at_once):
    monkeypatch.setattr(reading, "_READ_ELEMENTS", elements_at_once)
    values = torch.randn(23, generator=torch.Generator().manual_seed(0))
    values[5], values[6] = -0.0, 1e-42  # the sign of zero and a subnormal are bits too
    parts = [Fragment("weights", "w", (23,), i, values[i : i + 4]) for i in range(0, 23, 4)]
    save_checkpoint(Save(tmp_path, 1, {}, Info(), 1), reversed(parts))
    checkpoint = open_checkpoint(tmp_path, 1, check_content=True)
    assert len({piece.shard for piece in checkpoint.tensors["weights"]["w"].pieces}) == 6
    assert checkpoint.read("weights", "w", 3, 2).tolist() == values[3:5].tolist()
    for start in range(23):
        assert torch.equal(checkpoint.read("weights", "w", start), values[start:])
        for stop in range(start, 24):
            part = checkpoint.read("weights", "w", start, stop - start)
            assert torch.equal(part.view(torch.int32), values[start:stop].view(torch.int32)), (start, stop)


def test_the_files_alone_give_the_tensors_without_our_reader(tmp_path):
    whole = whole_tensors(save(tmp_path, 7))
    assert whole["weights"]["a.weight"].tolist() == [[7, 8, 9], [10, 11, 12]]
    assert whole["exp_avg"]["a.weight"].tolist() == [[14, 16, 18], [20, 22, 24]]
    assert whole["exp_avg_sq"]["b.weight"].tolist() == [21, 24]
    assert {kind: set(named) for kind, named in whole.items()} == {kind: set(SHAPES) for kind in KINDS}


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert names_in(tmp_path) == ["step-00000003", "step-00000010"]


def test_the_newest_is_the_one_of_the_last_step_whenever_its_files_were_touched(tmp_path):
    """As after a copy of the run to another disk."""
    for step in (1, 10, 2):
        save(tmp_path, step)
    os.utime(tmp_path / "step-00000001", (2e9, 2e9))
    assert newest(tmp_path)[0].step == 10
    save(tmp_path, 11, keep=2)
    assert names_in(tmp_path) == ["step-00000010", "step-00000011"]


def test_older_ones_are_deleted_only_after_the_new_one_has_its_name(tmp_path, monkeypatch):
    """A process that is killed before that, or cannot go on, leaves the older one."""
    save(tmp_path, 1, keep=1)
    real_rename = Path.rename

    def rename(path, target):
        if target.name == "step-00000002":
            raise OSError("killed")
        return real_rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(RunError, match="killed"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert newest(tmp_path)[0].step == 1
    save(tmp_path, 2, keep=1)
    assert names_in(tmp_path) == ["step-00000002"]


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, 2)
    save_checkpoint(Save(tmp_path, 2, {}, Info(), 5), fragments(make_state(9)))
    checkpoint, warnings = newest(tmp_path)
    assert checkpoint.read("weights", "b.weight").tolist() == [9, 10]
    assert (warnings, names_in(tmp_path)) == ([], ["step-00000002"])


def test_files_hold_little_more_than_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.checkpoint.saving._SHARD_BYTES", 50_000)
    big = torch.randn(1000, 100)
    parts = [Fragment(kind, "slice", (10_000,), 0, big[:100].view(-1)) for kind in KINDS]
    path = save_checkpoint(Save(tmp_path, 1, {}, Info(), 1), parts)
    assert sum(file.stat().st_size for file in path.iterdir()) < 1.05 * 3 * 10_000 * 4


def test_a_write_that_was_cut_short_is_invisible_and_cleaned_by_the_next(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr("moe.checkpoint.saving.os.fsync", full)
    with pytest.raises(RunError, match="disk full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    checkpoint, warnings = newest(tmp_path)
    assert (checkpoint.step, warnings) == (1, [])
    save(tmp_path, 2)
    assert newest(tmp_path)[0].step == 2
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_all_files_are_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path, monkeypatch):
    flushed, real_rename = [], Path.rename
    monkeypatch.setattr(
        "moe.checkpoint.saving.os.fsync",
        lambda descriptor: flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))),
    )

    def rename(path, target):
        assert {*path.iterdir(), path} <= set(flushed)
        return real_rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    final = save(tmp_path, 1)
    assert flushed[-1] == tmp_path  # and the name itself
    assert len(list(final.glob("*.safetensors"))) > 1


def test_left_overs_of_killed_runs_are_invisible_and_cleaned_by_the_next_save(tmp_path):
    whole = save(tmp_path, 1)
    for name in (".step-00000009.partial", ".step-00000008.removed"):
        shutil.copytree(whole, tmp_path / name)
    checkpoint, warnings = newest(tmp_path)
    assert (checkpoint.step, warnings) == (1, [])
    save(tmp_path, 2)
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_state_that_is_not_finite_is_never_written(tmp_path, bad):
    state = make_state(1)
    state["exp_avg"]["b.weight"] = torch.tensor([1.0, bad])
    with pytest.raises(RunError, match=r"exp_avg of b.weight are not finite"):
        save_checkpoint(Save(tmp_path, 3, {}, Info(), 1), fragments(state))
    assert newest_checkpoint(tmp_path) == (None, [])
    assert not any(name.startswith("step-") for name in names_in(tmp_path))


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ([(0, 4)], "a.weight ends at element 4"),
        ([(0, 4), (3, 6)], "a.weight has a gap or overlap at element 4"),
        ([(0, 2), (4, 6)], "a.weight has a gap or overlap at element 2"),
    ],
)
def test_a_state_with_a_hole_or_an_overlap_is_never_published(tmp_path, parts, named):
    values = torch.arange(6.0)
    pieces = [Fragment("weights", "a.weight", (2, 3), start, values[start:stop]) for start, stop in parts]
    with pytest.raises(RunError, match=named):
        save_checkpoint(Save(tmp_path, 1, {}, Info(), 1), pieces)
    assert newest_checkpoint(tmp_path) == (None, [])


def test_two_pieces_of_a_tensor_in_one_shard_are_both_there(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.checkpoint.saving._SHARD_BYTES", 2**20)
    path = save_checkpoint(Save(tmp_path, 1, {}, Info(), 1), fragments(make_state(1), length=3))
    checkpoint, _ = newest(tmp_path)
    assert checkpoint.read("weights", "a.weight").tolist() == [1, 2, 3, 4, 5, 6]
    assert whole_tensors(path)["weights"]["a.weight"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_many_shards_are_read_with_few_files_open(tmp_path, monkeypatch):
    """300 shards, and 40 more files than are open now."""
    values = torch.arange(300.0)
    parts = [Fragment("weights", "w", (300,), i, values[i : i + 1]) for i in range(300)]
    monkeypatch.setattr("moe.checkpoint.saving._SHARD_BYTES", 4)
    save_checkpoint(Save(tmp_path, 1, {}, Info(), 1), parts)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, limit[1]))
    try:
        checkpoint = newest(tmp_path)[0]
        assert torch.equal(checkpoint.read("weights", "w"), values)
        assert torch.equal(checkpoint.read("weights", "w", 7, 90), values[7:97])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len({piece.shard for piece in checkpoint.tensors["weights"]["w"].pieces}) == 300
