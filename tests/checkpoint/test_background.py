"""A checkpoint is written while training goes on."""

import os
import threading
import time

import pytest
import torch

from moe.checkpoint.background import BackgroundSaver
from moe.checkpoint.manifest import Info
from moe.checkpoint.saving import Fragment, Save
from moe.config import RunError
from tests.support.checkpoints import fragments, make_state, names_in, newest
from tests.support.ranks import run_ranks
from tests.support.training import train_once


@pytest.fixture
def held(monkeypatch):
    """Writing waits until this event is set."""
    event, write = threading.Event(), Save.write

    def wait_and_write(self, parts):
        assert event.wait(10)
        return write(self, parts)

    monkeypatch.setattr(Save, "write", wait_and_write)
    yield event
    event.set()


def save_of(folder, step, keep=5):
    return Save(folder, step, {}, Info(), keep)


def test_what_is_saved_is_the_state_at_the_start_whatever_training_does_meanwhile(tmp_path, held):
    values = torch.arange(6.0)
    with BackgroundSaver() as saver:
        saver.start(save_of(tmp_path, 1), [Fragment("weights", "w", (6,), 0, values)])
        values.fill_(torch.nan)
        assert saver.is_writing
        assert names_in(tmp_path) == [".step-00000001.partial"], "not visible yet"
        held.set()
    assert not saver.is_writing
    assert newest(tmp_path)[0].read("weights", "w").tolist() == [0, 1, 2, 3, 4, 5]
    assert names_in(tmp_path) == ["step-00000001"]


def test_a_second_save_waits_for_the_first(tmp_path, held):
    saver = BackgroundSaver()
    saver.start(save_of(tmp_path, 1), fragments(make_state(1)))
    threading.Timer(0.2, held.set).start()
    saver.start(save_of(tmp_path, 2), fragments(make_state(2)))
    assert newest(tmp_path)[0].step == 1
    saver.finish()
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]
    saver.finish()  # nothing is under way


def test_a_failed_write_is_raised_where_it_is_finished_and_the_one_before_stays(tmp_path):
    saver, bad = BackgroundSaver(), make_state(2)
    bad["exp_avg"]["b.weight"] = torch.tensor([1.0, torch.inf])
    saver.start(save_of(tmp_path, 1), fragments(make_state(1)))
    saver.start(save_of(tmp_path, 2), fragments(bad))
    with pytest.raises(RunError, match=r"exp_avg of b.weight are not finite; the checkpoint was not saved"):
        saver.finish()
    assert newest(tmp_path)[0].step == 1
    saver.start(save_of(tmp_path, 3), fragments(make_state(3)))
    saver.finish()
    assert names_in(tmp_path) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("error", [RunError("too many skipped"), KeyboardInterrupt()])
def test_a_run_that_fails_still_gets_its_last_checkpoint_unless_it_is_interrupted(tmp_path, held, error):
    threading.Timer(0.1, held.set).start()
    saver = BackgroundSaver()
    saver.start(save_of(tmp_path, 1), fragments(make_state(1)))
    with pytest.raises(type(error)), saver:
        raise error
    published = isinstance(error, RunError)
    assert names_in(tmp_path) == ["step-00000001" if published else ".step-00000001.partial"]


def save_on_two_ranks(folder):
    """Rank 1 fails to write the first one, of which rank 0 has written its part; the second is whole."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else join()
    parts = [Fragment("weights", "w", (4,), 2 * rank, torch.tensor([1.0, 2.0]) + 2 * rank)]
    bad = [parts[0]._replace(values=torch.tensor([torch.nan, 0.0]))] if rank else parts
    saver = BackgroundSaver()
    saver.start(save_of(folder, 1), bad)
    with pytest.raises(RunError) as failure:
        saver.finish()
    saver.start(save_of(folder, 2), parts)
    saver.finish()
    return str(failure.value)


def join():
    torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank()


def test_a_rank_that_cannot_write_fails_the_save_on_all(tmp_path):
    messages = run_ranks(2, save_on_two_ranks, tmp_path)
    assert messages == 2 * ["rank 1: weights of w are not finite; the checkpoint was not saved"]
    assert names_in(tmp_path) == ["step-00000002"]
    assert newest(tmp_path)[0].read("weights", "w").tolist() == [1, 2, 3, 4]


def train_where_rank_1_writes_slowly(arguments):
    write = Save.write

    def write_slowly(self, fragments):
        time.sleep(0.5 * int(os.environ["RANK"]))
        return write(self, fragments)

    Save.write = write_slowly
    return train_once(arguments)


def test_ranks_go_on_together_while_one_of_them_still_writes(small, short_samples, tmp_path):
    run = tmp_path / "run"
    arguments = [*small, "train.steps=12", "train.checkpoint_interval=4", "parallel.timeout_s=20"]
    for trained in run_ranks(2, train_where_rank_1_writes_slowly, [*arguments, f"run.dir={run}"]):
        assert trained.code == 0, trained
    assert names_in(run / "checkpoints") == ["step-00000008", "step-00000012"]
