"""Checkpoints of a real run are damaged at random, and the run goes on."""

import os
import random
import shutil

import pytest

from moe.checkpoint import saving
from tests.support.checkpoints import flip_a_bit
from tests.support.runs import assert_same_run


def flip_any_bit(files, choices):
    file = choices.choice(files)
    flip_a_bit(file, choices.randrange(file.stat().st_size))


def truncate(files, choices):
    file = choices.choice(files)
    os.truncate(file, choices.randrange(file.stat().st_size))


def delete(files, choices):
    choices.choice(files).unlink()


def swap(files, choices):
    one, other = choices.sample(files, 2)
    spare = one.with_name("spare")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


@pytest.mark.parametrize("damage", [flip_any_bit, truncate, delete, swap])
def test_a_run_whose_last_checkpoint_is_damaged_names_it_and_ends_as_before(
    run_main, tmp_path, monkeypatch, damage
):
    monkeypatch.setattr(saving, "_SHARD_BYTES", 2**15)
    _, whole, _, _ = run_main(folder="whole")
    for seed in range(5):
        run = shutil.copytree(whole, tmp_path / str(seed))
        files = sorted((run / "checkpoints" / "step-00000012").iterdir())
        assert len(files) > 5
        damage(files, random.Random(seed))
        code, _, out, err = run_main(folder=str(seed))
        assert code == 0, err
        assert "step-00000012 is damaged (" in err
        assert "resumed from" in out
        assert "step-00000008" in out
        assert_same_run(run, whole)
        assert (run / "checkpoints" / "damaged-step-00000012").exists()
