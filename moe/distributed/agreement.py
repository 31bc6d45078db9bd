"""Errors that all ranks agree on: one rank's failure is raised on every rank, so that none waits for it."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world

from moe.config import RunError

_Result = TypeVar("_Result")

HOST_GROUP = "host"  # description of the group of all ranks whose collectives run on the host
_HOST_TIMEOUT = datetime.timedelta(hours=2)  # a rank may save, load or read text for long


def on_all_ranks(action: Callable[[], _Result]) -> list[_Result]:
    """Run one action on every rank and share the results. Every rank has to call this.

    Returns:
        The result of each rank, in the order of ranks.

    Raises:
        RunError: the action failed on some rank; the same error on all ranks, naming the first such rank.
    """
    result, problem = None, None
    try:
        result = action()
    except (OSError, RuntimeError, ValueError, RunError) as error:
        problem = str(error)
    rank, size = rank_and_size()
    outcomes: list[Any] = [None] * size
    outcomes[rank] = result, problem
    if size > 1:
        torch.distributed.all_gather_object(outcomes, (result, problem), group=_host_group())
    for rank, (_, problem) in enumerate(outcomes):
        if problem is not None:
            raise RunError(f"rank {rank}: {problem}" if size > 1 else problem)
    return [result for result, _ in outcomes]


def make_host_group() -> None:
    """Give `on_all_ranks` a group whose timeout is long, and that needs no device; once, on all ranks."""
    if _host_group() is None:
        torch.distributed.new_group(backend="gloo", timeout=_HOST_TIMEOUT, group_desc=HOST_GROUP)


def _host_group() -> ProcessGroup | None:
    """That group, which torch keeps with all others; None before it is made: then the group of all ranks."""
    return next((group for group in _world.pg_map if group.group_desc == HOST_GROUP), None)


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) before the process group exists."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
