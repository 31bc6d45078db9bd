import contextlib
import ctypes
import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.reading import newest_checkpoint, open_checkpoint
from moe.checkpoint.saving import Fragment, save_checkpoint, set_aside_newer

KINDS = ("weights", "exp_avg", "exp_avg_sq")
SHAPES = {"a.weight": (2, 3), "b.weight": (2,)}


def make_state(value):
    """a.weight is [[0, 1, 2], [3, 4, 5]] + value, b.weight its first two; the moments, 2 and 3 times that."""
    base = torch.arange(6, dtype=torch.float32) + value
    return {kind: {"a.weight": base * i, "b.weight": base[:2] * i} for i, kind in enumerate(KINDS, 1)}


def fragments(state, length=4):
    """The state in pieces of at most `length` elements."""
    for kind, named in state.items():
        for name, values in named.items():
            for start in range(0, len(values), length):
                yield Fragment(kind, name, SHAPES[name], start, values[start : start + length])


def save(folder, step, keep=5):
    return save_checkpoint(folder, step, fragments(make_state(step)), {"run": {"seed": 3}}, {"x": step}, keep)


def whole_tensors(path):
    """Kind -> name -> tensor of its full shape, from the files alone."""
    manifest = json.loads((path / "manifest.json").read_text())
    shards = {name: load_file(path / name) for name in manifest["shards"]}
    whole = {}
    for kind, named in manifest["tensors"].items():
        for name, entry in named.items():
            pieces = sorted(entry["pieces"], key=lambda piece: piece["start"])
            parts = [shards[piece["shard"]][f"{kind}/{name}"] for piece in pieces]
            assert [len(part) for part in parts] == [piece["numel"] for piece in pieces]
            whole.setdefault(kind, {})[name] = torch.cat(parts).view(entry["shape"])
    return whole


@pytest.fixture(autouse=True)
def _four_elements_to_a_shard(monkeypatch):
    monkeypatch.setattr("moe.checkpoint._SHARD_BYTES", 16)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 7)
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert (checkpoint.path, checkpoint.step, warnings) == (path, 7, [])
    assert (checkpoint.config, checkpoint.info) == ({"run": {"seed": 3}}, {"x": 7})
    assert checkpoint.tensors.keys() == set(KINDS)
    for kind, named in make_state(7).items():
        assert checkpoint.tensors[kind].keys() == named.keys()
        for name, values in named.items():
            assert torch.equal(checkpoint.read(kind, name), values)


def test_any_part_of_a_tensor_is_read_whichever_shards_it_lies_in(tmp_path):
    values = torch.randn(23, generator=torch.Generator().manual_seed(0))
    values[5], values[6] = -0.0, 1e-42  # the sign of zero and a subnormal are bits too
    parts = [Fragment("weights", "w", (23,), i, values[i : i + 4]) for i in range(0, 23, 4)]
    save_checkpoint(tmp_path, 1, reversed(parts), {}, {}, 1)
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


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    save(tmp_path, 2)
    save_checkpoint(tmp_path, 2, fragments(make_state(9)), {}, {}, 5)
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert checkpoint.read("weights", "b.weight").tolist() == [9, 10]
    assert (warnings, names_in(tmp_path)) == ([], ["step-00000002"])


def test_files_hold_little_more_than_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.checkpoint._SHARD_BYTES", 50_000)
    big = torch.randn(1000, 100)
    parts = [Fragment(kind, "slice", (10_000,), 0, big[:100].view(-1)) for kind in KINDS]
    path = save_checkpoint(tmp_path, 1, parts, {}, {}, 1)
    assert sum(file.stat().st_size for file in path.iterdir()) < 1.05 * 3 * 10_000 * 4


def shard_of(path, kind="weights", name="a.weight"):
    manifest = json.loads((path / "manifest.json").read_text())
    return path / manifest["tensors"][kind][name]["pieces"][0]["shard"]


def flip_a_bit(file, place=-1):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def resign(path, change=lambda manifest: None):
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


def edit_piece(path, **changes):
    resign(path, lambda m: m["tensors"]["weights"]["a.weight"]["pieces"][1].update(changes))


def outside_of(path):
    folder = path.parent.parent / "outside"
    folder.mkdir(exist_ok=True)
    return folder


def name_a_file_outside(path):
    """A sound file with the right checksum, but not this checkpoint's."""
    shard, hostile = shard_of(path), "../../outside/sound.safetensors"
    shutil.copy(shard, outside_of(path) / "sound.safetensors")

    def change(manifest):
        manifest["shards"][hostile] = manifest["shards"].pop(shard.name)
        manifest["tensors"]["weights"]["a.weight"]["pieces"][0]["shard"] = hostile

    shard.unlink()
    resign(path, change)


def link_outside(path, file):
    shutil.copy(file, outside_of(path) / file.name)
    file.unlink()
    file.symlink_to(outside_of(path) / file.name)


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
    "hostile file name": (name_a_file_outside, "names a file that is no shard: '../../outside/sound"),
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
        "a.weight is in '00008-00000.safetensors', which is no shard",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    harm, named = DAMAGE[damage]
    harm(save(folder, 2))
    checkpoint, warnings = newest_checkpoint(folder)
    assert checkpoint.step == 1
    assert torch.equal(checkpoint.read("weights", "a.weight"), make_state(1)["weights"]["a.weight"])
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]
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
            file.write_bytes(sound)
    assert newest_checkpoint(tmp_path)[0].step == 2
    assert torch.equal(whole_tensors(path)["weights"]["a.weight"], before["weights"]["a.weight"])


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
    checkpoint, _ = newest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{shard_of(path).name}: weights/a.weight"):
        checkpoint.read("weights", "a.weight")
    assert checkpoint.read("weights", "b.weight").tolist() == [1, 2]


def test_a_write_that_was_cut_short_is_invisible_and_cleaned_by_the_next(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path):
        raise OSError("disk full")

    monkeypatch.setattr("moe.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match="disk full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert (checkpoint.step, warnings) == (1, [])
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path)[0].step == 2
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_left_overs_of_killed_runs_are_invisible_and_cleaned_by_the_next_save(tmp_path):
    whole = save(tmp_path, 1)
    for name in (".step-00000009.partial", ".step-00000008.removed"):
        shutil.copytree(whole, tmp_path / name)
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert (checkpoint.step, warnings) == (1, [])
    save(tmp_path, 2)
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_state_that_is_not_finite_is_never_written(tmp_path, bad):
    state = make_state(1)
    state["exp_avg"]["b.weight"] = torch.tensor([1.0, bad])
    with pytest.raises(CheckpointError, match=r"exp_avg of b.weight are not finite"):
        save_checkpoint(tmp_path, 3, fragments(state), {}, {}, 1)
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
    with pytest.raises(CheckpointError, match=named):
        save_checkpoint(tmp_path, 1, pieces, {}, {}, 1)
    assert newest_checkpoint(tmp_path) == (None, [])


def test_two_pieces_of_a_tensor_in_one_shard_are_both_there(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.checkpoint._SHARD_BYTES", 2**20)
    path = save_checkpoint(tmp_path, 1, fragments(make_state(1), length=3), {}, {}, 1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint.read("weights", "a.weight").tolist() == [1, 2, 3, 4, 5, 6]
    assert whole_tensors(path)["weights"]["a.weight"].tolist() == [[1, 2, 3], [4, 5, 6]]


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
    assert newest_checkpoint(tmp_path)[0].step == 1


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    save(tmp_path, 1)
    checkpoint, _ = newest_checkpoint(tmp_path)
    checkpoint.check_names("weights", SHAPES)
    with pytest.raises(CheckpointError, match=r"exp_avg: missing \['c'\], unexpected \['b.weight'\]"):
        checkpoint.check_names("exp_avg", {"a.weight": (2, 3), "c": (1,)})
    with pytest.raises(CheckpointError, match=r"weights: a.weight is \(2, 3\), not \(3, 2\)"):
        checkpoint.check_names("weights", SHAPES | {"a.weight": (3, 2)})
    with pytest.raises(CheckpointError, match=r"momentum: missing \['a.weight'"):
        checkpoint.check_names("momentum", SHAPES)


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


@pytest.mark.parametrize("harm", ["hostile file name", "shard a link", "manifest a link"])
def test_a_checkpoint_that_points_outside_is_refused_before_anything_there_is_read(tmp_path, harm):
    path = save(tmp_path / "checkpoints", 1)
    DAMAGE[harm][0](path)
    with untouched(outside_of(path)):
        assert newest_checkpoint(tmp_path / "checkpoints")[0] is None
        set_aside_newer(tmp_path / "checkpoints", 0)
        save(tmp_path / "checkpoints", 1, keep=1)
        set_aside_newer(tmp_path / "checkpoints", 0)
        save(tmp_path / "checkpoints", 1, keep=1)
        assert newest_checkpoint(tmp_path / "checkpoints")[0].step == 1


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
        assert newest_checkpoint(folder)[0].step == 3
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
        assert newest_checkpoint(folder)[0].step == 2
        set_aside_newer(folder, 1)
    assert [name for name in names_in(folder) if not name.startswith("damaged")] == ["step-00000001"]
    assert len(list(folder.glob("damaged-step-00000002-*"))) == 1
