"""What a launcher tells a process, freed memory, and the timeout of every process group."""

import subprocess
import sys

import pytest
import torch
from torch.distributed.distributed_c10d import _world

from moe.config import ConfigError, ParallelConfig
from moe.distributed.launch import choose_device, widest_float, world_size
from moe.training.engine import start
from tests.support.engines import batches, loss_of, make_config, make_engine
from tests.support.ranks import run_ranks


def test_half_a_launchers_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: is set but .*MASTER_PORT not; use torchrun"):
        world_size()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert world_size() == 1


@pytest.mark.parametrize(
    ("seen", "asked", "expected"),
    [
        ("cuda", "auto", "cuda:1"), ("cuda", "cuda", "cuda:1"), ("cuda", "cpu", "cpu"),
        ("xpu", "auto", "cpu"), ("xpu", "xpu", "xpu:1"),
        (None, "auto", "cpu"), (None, "cpu", "cpu"),
    ],
)  # fmt: skip
def test_a_process_has_the_device_of_its_place_on_the_node(monkeypatch, seen, asked, expected):
    has_devices(monkeypatch, seen, count=2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(ParallelConfig(device=asked)) == torch.device(expected)


@pytest.mark.parametrize(
    ("seen", "asked", "place", "message"),
    [
        (None, "cuda", "0", "parallel.device: torch sees no CUDA device; set it to cpu or auto"),
        ("cuda", "mps", "0", "parallel.device: torch sees no MPS device; set it to cpu or auto"),
        ("xpu", "xpu", "2", "parallel.device: process 2 of this node has none of its 2 XPU devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, seen, asked, place, message):
    has_devices(monkeypatch, seen, count=2)
    monkeypatch.setenv("LOCAL_RANK", place)
    with pytest.raises(ConfigError) as refused:
        choose_device(ParallelConfig(device=asked))
    assert str(refused.value).startswith(message)


def has_devices(monkeypatch, kind, count):
    seen = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: seen)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_sums_are_in_fp64_where_the_device_has_it():
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32


def timeouts_of_all_groups():
    config = make_config(
        parallel={"ep_size": 2, "timeout_s": 77.0}, train={"global_batch_size": 8, "micro_batch_size": 2}
    )
    world = start(config.parallel)
    engine = make_engine(config, world)
    mine = batches(1)[0][2 * world.rank : 2 * world.rank + 2]
    engine.backward(loss_of(engine(mine[:, :-1]), mine, config))
    engine.step(1e-3)
    cpu = torch.device("cpu")
    return {
        _world.pg_names[group]: group._get_backend(cpu).options._timeout.total_seconds()
        for group in _world.pg_map
    }


def test_every_process_group_has_the_timeout_but_the_one_of_the_hosts():
    for timeouts in run_ranks(4, timeouts_of_all_groups):
        assert len(timeouts) >= 4  # all ranks, those that split the experts, those that hold the same
        assert sorted(timeouts.values())[-1] == 2 * 3600
        assert set(sorted(timeouts.values())[:-1]) == {77.0}, timeouts


FREE_AND_TAKE = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page of 2 MiB would be one fault
from moe.config import ParallelConfig
from moe.training.engine import start
start(ParallelConfig(keep_freed_memory=sys.argv[1] == "true"))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(12):  # a hole that is a few bytes too small is taken only together with its neighbour
    faults()
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(max(faults() for _ in range(3)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_stays_with_the_process_and_no_more_than_that_or_goes_back(kept):
    """64 MiB are 16,384 pages: taken again they fault in anew, unless they were kept."""
    command = [sys.executable, "-c", FREE_AND_TAKE, str(kept).lower()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    faults, growth_kib = map(int, done.stdout.split())
    assert faults < 100 if kept else faults > 10_000
    assert growth_kib < 1024
