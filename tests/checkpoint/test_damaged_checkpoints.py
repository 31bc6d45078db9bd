"""A damaged checkpoint is named, the one before is used, and nothing of it is lost."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.checkpoint.manifest import CheckpointError, check_content, read_manifest
from moe.checkpoint.reading import newest_checkpoint, open_checkpoint
from moe.checkpoint.saving import set_aside_newer
from tests.support.checkpoints import (
    SHAPES,
    flip_a_bit,
    link_outside,
    make_state,
    name_a_file_outside,
    names_in,
    newest,
    resign,
    save,
    shard_of,
    whole_tensors,
)

pytestmark = pytest.mark.usefixtures("four_elements_to_a_shard")


def edit_piece(path, **changes):
    resign(path, lambda m: m["tensors"]["weights"]["a.weight"]["pieces"][1].update(changes))


def edit_info(path, **changes):
    resign(path, lambda m: m["info"].update(changes))


DAMAGE = {
    "truncated": (lambda path: os.truncate(shard_of(path), 30), "has 30 bytes instead of"),
    "empty": (lambda path: os.truncate(shard_of(path), 0), "has 0 bytes instead of"),
    "bit flipped": (lambda path: flip_a_bit(shard_of(path)), "does not match its checksum"),
    "bit of the header flipped": (lambda path: flip_a_bit(shard_of(path), 12), "does not match its checksum"),
    "shard missing": (lambda path: shard_of(path).unlink(), r"00000-0000\d.safetensors is missing"),
    "extra shard": (
        lambda path: shutil.copy(shard_of(path), path / "00009-00000.safetensors"),
        "holds '00009-00000.safetensors', which manifest.json does not name",
    ),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest not JSON": (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
    "manifest not text": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "manifest endless": (lambda path: (path / "manifest.json").write_text("[" * 100_000), "cannot be read"),
    "manifest a list": (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
    "manifest empty": (lambda path: (path / "manifest.json").write_text("{}"), "of format None"),
    "manifest of format 1": (lambda path: resign(path, lambda m: m.update(format=1)), "of format 1, not 2"),
    "manifest without a key": (lambda path: resign(path, lambda m: m.pop("writer")), "cannot be read"),
    "manifest with a key more": (lambda path: resign(path, lambda m: m.update(x=1)), "cannot be read"),
    "odd seconds": (lambda path: edit_info(path, wall_s="long"), "cannot be read"),
    "infinite seconds": (lambda path: edit_info(path, wall_s=1e999), "cannot be read"),
    "skipped steps below 0": (lambda path: edit_info(path, skipped_steps=-1), "cannot be read"),
    "information a list": (lambda path: resign(path, lambda m: m.update(info=[1])), "cannot be read"),
    "manifest unsigned": (
        lambda path: (path / "manifest.json").write_text('{"format": 2}'),
        "cannot be read",
    ),
    "manifest bit flipped": (
        lambda path: flip_a_bit(path / "manifest.json", (path / "manifest.json").read_bytes().index(b"7")),
        "manifest.json does not match its checksum",
    ),
    "manifest of another step": (
        lambda path: shutil.copy(path.parent / "step-00000001" / "manifest.json", path / "manifest.json"),
        "manifest.json is of step 1",
    ),
    "manifest a link": (lambda path: link_outside(path, path / "manifest.json"), "manifest.json is a link"),
    "hostile file name": (name_a_file_outside, "names a file that is not a shard: '../../outside/sound"),
    "shard a link": (lambda path: link_outside(path, shard_of(path)), "safetensors is a link"),
    "gap": (lambda path: edit_piece(path, start=5, numel=1), "a.weight has a gap or overlap at element 4"),
    "overlap": (
        lambda path: edit_piece(path, start=3, numel=3),
        "a.weight has a gap or overlap at element 4",
    ),
    "too short": (lambda path: edit_piece(path, numel=1), "a.weight ends at element 5 of"),
    "too long": (lambda path: edit_piece(path, numel=3), "a.weight ends at element 7 of"),
    "empty piece": (lambda path: edit_piece(path, numel=0), "cannot be read"),
    "piece before the tensor": (lambda path: edit_piece(path, start=-2), "cannot be read"),
    "piece in a file that is not named": (
        lambda path: edit_piece(path, shard="00008-00000.safetensors"),
        "a.weight is in '00008-00000.safetensors', which is not a shard",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    harm, named = DAMAGE[damage]
    harm(save(folder, 2))
    checkpoint, warnings = newest(folder)
    assert checkpoint.step == 1
    assert torch.equal(checkpoint.read("weights", "a.weight"), make_state(1)["weights"]["a.weight"])
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]
    assert warnings[0].endswith("; trying the one before")
    with pytest.raises(CheckpointError, match=named) as problem:
        open_checkpoint(folder, 2, check_content=True)
    assert str(problem.value) in warnings[0]


def test_no_flipped_bit_of_a_manifest_or_a_shard_goes_unnoticed(tmp_path):
    path = save(tmp_path, 2)
    before = whole_tensors(path)
    for file in (path / "manifest.json", shard_of(path)):
        sound = file.read_bytes()
        for place in range(0, len(sound), 5):
            flip_a_bit(file, place)
            checkpoint, warnings = newest_checkpoint(tmp_path)
            assert checkpoint is None, (file.name, place)
            assert len(warnings) == 1
            assert warnings[0].endswith("; there is none before it")
            file.write_bytes(sound)
    assert newest(tmp_path)[0].step == 2
    assert torch.equal(whole_tensors(path)["weights"]["a.weight"], before["weights"]["a.weight"])


@pytest.mark.parametrize("num_ranks", [1, 4])  # of six shards
def test_every_shard_is_compared_with_its_checksum_by_one_rank(tmp_path, num_ranks):
    path = save(tmp_path, 1)
    manifest = read_manifest(path / "manifest.json")
    for shard in manifest.shards:
        flip_a_bit(path / shard)
        noticed = []
        for rank in range(num_ranks):
            try:
                check_content(path, manifest, rank, num_ranks)
            except CheckpointError as problem:
                noticed.append(str(problem))
        assert noticed == [f"{shard} does not match its checksum"]
        flip_a_bit(path / shard)


def without_the_tensor(path):
    values = load_file(shard_of(path))
    save_file({f"{name}.old": tensor for name, tensor in values.items()}, shard_of(path))


def of_another_length(path):
    save_file({"weights/a.weight": torch.zeros(3)}, shard_of(path))


def of_one_element(path):
    save_file({"weights/a.weight": torch.zeros(1)}, shard_of(path))


@pytest.mark.parametrize("harm", [without_the_tensor, of_another_length, of_one_element])
def test_a_shard_that_does_not_hold_its_piece_is_named_when_it_is_read(tmp_path, harm):
    path = save(tmp_path, 1)
    harm(path)
    resign(path)
    checkpoint, _ = newest(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{shard_of(path).name}: weights/a.weight"):
        checkpoint.read("weights", "a.weight")
    assert checkpoint.read("weights", "b.weight").tolist() == [1, 2]


def test_damaged_checkpoints_make_way_but_are_not_deleted(tmp_path):
    save(tmp_path, 1)
    for times in (1, 2):
        harm, _named = DAMAGE["truncated"]
        harm(save(tmp_path, 2))
        set_aside_newer(tmp_path, 1)
        aside = sorted(tmp_path.glob("damaged-step-00000002*"))
        assert len(aside) == times
        assert all((path / "manifest.json").exists() for path in aside)
        assert names_in(tmp_path) == [*(path.name for path in aside), "step-00000001"]
    assert newest(tmp_path)[0].step == 1


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    save(tmp_path, 1)
    checkpoint, _ = newest(tmp_path)
    checkpoint.check_names("weights", SHAPES)
    with pytest.raises(CheckpointError, match=r"exp_avg: missing \['c'\], unexpected \['b.weight'\]"):
        checkpoint.check_names("exp_avg", {"a.weight": (2, 3), "c": (1,)})
    with pytest.raises(CheckpointError, match=r"weights: a.weight is \(2, 3\), not \(3, 2\)"):
        checkpoint.check_names("weights", SHAPES | {"a.weight": (3, 2)})
    with pytest.raises(CheckpointError, match=r"momentum: missing \['a.weight'"):
        checkpoint.check_names("momentum", SHAPES)
