"""Which errors are those of a lost rank. That the lost one is named: tests/commands/test_faults.py."""

import pytest
import torch

from moe.distributed.lost_ranks import why_lost

GLOO = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer\nand a stack of C++")


def test_an_error_that_is_no_collectives_is_not_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert why_lost(RuntimeError("shapes do not match")) is None


def test_alone_no_rank_can_be_lost(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert why_lost(GLOO) is None


@pytest.mark.parametrize("error", [GLOO, torch.distributed.DistStoreError("not all have come")])
def test_before_the_process_group_exists_this_rank_says_that_it_could_not_join(monkeypatch, error):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    first = str(error).splitlines()[0]
    assert why_lost(error) == f"rank 1: {first}: could not join the other ranks"
