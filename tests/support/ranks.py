"""Run a function on several real gloo ranks, each a process of its own."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from tests.support.launching import free_port

_Result = TypeVar("_Result")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.support.training",
        "deepspeed",
        "deepspeed.moe.layer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)


def start_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any
) -> tuple[list[BaseProcess], list[Connection]]:
    """Begin to call a module-level function on every rank: the processes, and the pipes of their results."""
    port, pipes, processes = free_port(), [], []
    for rank in range(world_size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_rank, args=(rank, world_size, port, sender, function, arguments), daemon=True
        )
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    return processes, pipes


def run_ranks(
    world_size: int, function: Callable[..., _Result], *arguments: Any, timeout_s: float = 240
) -> list[_Result]:
    """Call a module-level function on every rank; the results in the order of ranks.

    Fails with the traceback of the first rank that raised, or if a rank died or has not finished in time.
    """
    processes, pipes = start_ranks(world_size, function, *arguments)
    try:
        results, failures = [], []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(timeout_s), f"rank {rank} of {function.__name__} hangs"
            try:
                ok, result = pipe.recv()
            except EOFError:
                ok, result = False, "died"
            results.append(result)
            if not ok:
                failures.append(f"rank {rank}: {result}")
        assert not failures, "\n".join(failures)
        return results
    finally:
        for process in processes:
            process.join(5 if sys.exc_info()[0] is None else 0.1)
            process.kill()


def _rank(
    rank: int,
    world_size: int,
    port: str,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)
    try:
        outcome = (True, function(*arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    pipe.send(outcome)
    os._exit(0)
