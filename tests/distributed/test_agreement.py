"""One rank's failure is every rank's failure, with the same message."""

import os
import time

import pytest

from moe.config import ParallelConfig, RunError
from moe.distributed.agreement import on_all_ranks, rank_and_size
from moe.training.engine import start
from tests.support.ranks import run_ranks


def test_alone_the_result_is_a_list_of_one_and_the_error_names_no_rank():
    assert on_all_ranks(lambda: 7) == [7]
    with pytest.raises(RunError, match=r"^disk full$"):
        on_all_ranks(_fail)


def _fail() -> int:
    raise OSError("disk full")


def agree() -> tuple[list[int], list[str]]:
    """Results of all ranks; then the errors where rank 1 fails, and where both do."""
    start(ParallelConfig(device="cpu"))
    rank, size = rank_and_size()
    assert (rank, size) == (int(os.environ["RANK"]), 2)
    results, errors = on_all_ranks(lambda: 10 + rank), []
    for failing in ({1}, {0, 1}):
        with pytest.raises(RunError) as caught:
            on_all_ranks(lambda failing=failing: _fail() if rank in failing else rank)
        errors.append(str(caught.value))
    assert on_all_ranks(lambda: rank) == [0, 1]  # all ranks go on together
    return results, errors


def test_results_come_in_the_order_of_ranks_and_the_first_failed_rank_is_named_on_all():
    assert run_ranks(2, agree) == [([10, 11], ["rank 1: disk full", "rank 0: disk full"])] * 2


def wait_for_a_slow_rank() -> list[int]:
    world = start(ParallelConfig(timeout_s=1.0))

    def work() -> int:
        time.sleep(2.5 * world.rank)
        return world.rank

    return on_all_ranks(work)


def test_work_on_the_host_may_take_longer_than_a_collective():
    assert run_ranks(2, wait_for_a_slow_rank) == [[0, 1], [0, 1]]
