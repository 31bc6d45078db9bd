"""Which rank was lost, after a collective failed."""

import datetime
import queue
import threading
import time

import torch
from torch.distributed.distributed_c10d import _get_default_store

from moe.config import first_line
from moe.distributed.launch import rank, world_size

_PATIENCE_S = 5.0


def why_lost(error: RuntimeError) -> str | None:
    """One line on a failed collective and on the ranks that are missing; None if the error has another cause.

    Every rank on which a collective failed should call this, since that says that the rank is alive. A rank
    that says nothing within some seconds died, hangs, or is too busy to notice. Under NCCL, torch's watchdog
    may end the process first, with its own message.
    """
    text = str(error)
    is_collective = isinstance(error, torch.distributed.DistError) or "gloo" in text or "NCCL" in text
    if not is_collective or world_size() == 1:
        return None
    if not torch.distributed.is_initialized():
        return f"rank {rank()}: {first_line(error)}: could not join the other ranks"
    found: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
    threading.Thread(target=_find_silent_ranks, args=(found,), daemon=True).start()
    try:
        silent = found.get(timeout=2 * _PATIENCE_S)
    except queue.Empty:  # the store hangs, and so does rank 0, which keeps it where no launcher does
        silent = [0]
    who = f"no sign of life from rank {', '.join(map(str, silent))}" if silent else "every rank is alive"
    return f"rank {rank()}: {first_line(error)}: {who}"


def _find_silent_ranks(found: "queue.SimpleQueue[list[int]]") -> None:
    """Say through the store that this rank is alive, and put the ranks that do not say so into `found`."""
    store = _get_default_store()
    deadline = time.monotonic() + _PATIENCE_S
    silent = []
    try:
        store.set(f"alive/{rank()}", "1")
        for other in range(world_size()):
            left = max(deadline - time.monotonic(), 0.05)
            try:
                store.wait([f"alive/{other}"], datetime.timedelta(seconds=left))
            except torch.distributed.DistStoreError:
                silent.append(other)
    except (torch.distributed.DistNetworkError, ConnectionError):
        silent = [0]  # it keeps the store where no launcher does
    found.put(silent)
