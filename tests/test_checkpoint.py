import json
import pickle

import pytest
import torch

from moe.checkpoint import CheckpointError, check_names, newest_checkpoint, save_checkpoint, set_aside_newer


def make_state(value):
    base = torch.arange(6, dtype=torch.float32) + value
    kinds = {
        kind: {"a.weight": base.view(2, 3) * i, "b.weight": base[:2] * i}
        for i, kind in enumerate(("weights", "exp_avg", "exp_avg_sq"), 1)
    }
    return {**kinds, "rng": {"cpu": torch.get_rng_state()}}


def save(folder, step, keep=5):
    return save_checkpoint(folder, step, make_state(step), {"config": {"x": step}}, keep)


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    save(tmp_path, 7)
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert (checkpoint.step, checkpoint.info, warnings) == (7, {"config": {"x": 7}}, [])
    for kind, named in make_state(7).items():
        read = checkpoint.read(kind)
        assert read.keys() == named.keys()
        assert all(torch.equal(read[name], tensor) for name, tensor in named.items())


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_files_hold_little_more_than_their_tensors(tmp_path):
    big = torch.randn(1000, 100)
    state = {kind: {"slice": big[:10]} for kind in ("weights", "exp_avg", "exp_avg_sq", "rng")}
    path = save_checkpoint(tmp_path, 1, state, {}, 1)
    assert (path / "weights.safetensors").stat().st_size < 1.05 * 10 * 100 * 4


DAMAGE = {
    "truncated": lambda path: (path / "exp_avg.safetensors").write_bytes(b"abc"),
    "bit flipped": lambda path: flip_last_byte(path / "weights.safetensors"),
    "file missing": lambda path: (path / "exp_avg_sq.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest not JSON": lambda path: (path / "manifest.json").write_text("{"),
    "manifest of another shape": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest without a file": lambda path: edit(path, lambda m: m["files"].pop("weights.safetensors")),
    "hostile file name": lambda path: name_a_file_outside(path),
    "another step": lambda path: edit(path, lambda m: m.update(step=3)),
}


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def name_a_file_outside(path):
    """A sound file with the right checksum, but not this checkpoint's."""
    outside = path.parent.parent / "outside.safetensors"
    outside.write_bytes((path / "weights.safetensors").read_bytes())
    edit(path, lambda m: m["files"].update({"../../outside.safetensors": m["files"]["weights.safetensors"]}))


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    tmp_path = tmp_path / "checkpoints"
    save(tmp_path, 1)
    DAMAGE[damage](save(tmp_path, 2))
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert len(warnings) == 1
    assert "step-00000002 is damaged" in warnings[0]


def test_a_write_that_was_cut_short_is_invisible(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("moe.checkpoint._flush", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    checkpoint, warnings = newest_checkpoint(tmp_path)
    assert (checkpoint.step, warnings) == (1, [])
    save(tmp_path, 2)
    assert newest_checkpoint(tmp_path)[0].step == 2


def test_a_state_that_is_not_finite_is_never_written(tmp_path):
    state = make_state(1)
    state["exp_avg"]["b.weight"] = torch.tensor([1.0, float("inf")])
    with pytest.raises(CheckpointError, match=r"exp_avg of b.weight at step 3 are not finite"):
        save_checkpoint(tmp_path, 3, state, {}, 1)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_make_way_but_are_not_deleted(tmp_path):
    save(tmp_path, 1)
    DAMAGE["truncated"](save(tmp_path, 2))
    set_aside_newer(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged-step-00000002", "step-00000001"]


def test_a_planted_pickle_is_never_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = save(tmp_path / "c", 1)
    (path / "weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    (path / "weights.pt").write_bytes(pickle.dumps(Bomb()))
    assert newest_checkpoint(tmp_path / "c")[0] is None
    assert not (tmp_path / "executed").exists()


def test_missing_extra_and_misshapen_tensors_are_named():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"missing \['b'\], unexpected \['c'\]"):
        check_names(expected, {"a": torch.zeros(2), "c": torch.zeros(1)}, "weights")
    with pytest.raises(CheckpointError, match=r"b is \(4,\), not \(3,\)"):
        check_names(expected, {"a": torch.zeros(2), "b": torch.zeros(4)}, "weights")
    check_names(expected, expected, "weights")
