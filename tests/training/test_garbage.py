"""Garbage is collected between steps, and nothing large waits for it."""

import gc

import torch

from moe.training.engine import Engine
from moe.training.garbage import GarbageCollection


def test_garbage_is_collected_at_every_hundredth_step_and_not_in_between(monkeypatch):
    collections = []
    with GarbageCollection() as garbage:
        assert not gc.isenabled()
        monkeypatch.setattr(gc, "collect", lambda: collections.append(1))
        counts = []
        for done in range(1, 301):
            garbage.step(done)
            counts.append(len(collections))
    assert gc.isenabled()
    assert counts == [0] * 99 + [1] * 100 + [2] * 100 + [3]
    assert gc.get_freeze_count() == 0


def test_a_step_leaves_no_tensor_to_the_garbage_collection(run_main, monkeypatch):
    """It would keep the memory of up to a hundred steps."""
    left, steps, real_step = [], [], Engine.step

    def step(self, lr):
        assert not gc.isenabled()
        norms = real_step(self, lr)
        steps.append(lr)
        if len(steps) == 4:
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
        if len(steps) == 20:
            gc.collect()
            gc.set_debug(0)
            left.extend(gc.garbage)
            gc.garbage.clear()
        return norms

    monkeypatch.setattr(Engine, "step", step)
    assert run_main("train.activation_checkpointing=true")[0] == 0
    assert left, "Python leaves some objects in every step"
    assert not [each.shape for each in left if isinstance(each, torch.Tensor)]
