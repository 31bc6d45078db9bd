"""What a launcher tells a process, and joining and leaving the process group."""

import ctypes
import datetime
import os
import time
import uuid

import torch
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.rendezvous import rendezvous

from moe.config import ConfigError, ParallelConfig
from moe.distributed.agreement import HOST_GROUP, make_host_group

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def world_size() -> int:
    """Number of processes that the launcher started; 1 without one.

    Raises:
        ConfigError: only some of a launcher's variables are set.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError("WORLD_SIZE", f"is set but {', '.join(missing)} not; use torchrun, or unset it")
    return int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Place of this process among them."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def choose_device(parallel: ParallelConfig) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: a kind is asked for that torch does not see, or there are fewer than processes.
    """
    seen = torch.accelerator.current_accelerator(check_available=True)
    kind = parallel.device
    if kind == "auto":
        kind = "cuda" if seen is not None and seen.type == "cuda" else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    if seen is None or seen.type != kind:
        raise ConfigError("parallel.device", f"torch sees no {kind.upper()} device; set it to cpu or auto")
    place, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
    if place >= devices:
        problem = f"process {place} of this node has none of its {devices} {kind.upper()} devices"
        raise ConfigError("parallel.device", f"{problem}; start fewer, or use cpu")
    return torch.device(kind, place)


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype for sums of many numbers: fp64, or fp32 on MPS, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def keep_freed_memory() -> None:
    """Let this process reuse the memory that it frees; without effect where the C library is not glibc's.

    By default glibc returns large freed tensors to the system, which then has to clear every page of the next
    ones. What exceeds 2 GiB at the end of the heap is still returned.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap too
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TOP_PAD, 64 * 2**20)  # by which the heap grows at a time


def join(parallel: ParallelConfig, device: torch.device) -> None:
    """Join the process group of all ranks; without a launcher, make one of size 1."""
    if torch.distributed.is_initialized():
        return
    backend = torch.distributed.get_default_backend_for_device(device)
    timeout = datetime.timedelta(seconds=parallel.timeout_s)
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    if "WORLD_SIZE" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = _fresh(store, rank, size, parallel.timeout_s)
    else:
        # No launcher: DeepSpeed would ask for mpi4py. A store in memory needs no free port either.
        store, rank, size = HashStore(), 0, 1
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    make_host_group()


def join_alone(rank: int, size: int) -> None:
    """Be one of `size` ranks without the others: groups can be made, and collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def _fresh(store: Store, rank: int, size: int, timeout_s: float) -> Store:
    """A part of the store that nobody has written to: torchrun keeps one store over all its restarts.

    Its workers would find the addresses of killed ones there. `TORCHELASTIC_RESTART_COUNT` cannot name
    that part, since each node has its own count.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", name)
        fresh = PrefixStore(store.get(f"welcome/{name}").decode(), store)
        fresh.add("arrived", 1)
        return fresh
    fresh = PrefixStore(name, store)
    deadline = time.monotonic() + timeout_s
    while fresh.add("arrived", 0) < size - 1:
        if time.monotonic() > deadline:
            raise torch.distributed.DistStoreError(f"not all of the {size} ranks have come")
        for other in range(1, size):
            if store.check([f"hello/{other}"]):  # perhaps of a killed one: then nobody reads the answer
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
        time.sleep(0.02)
    return fresh


def leave() -> None:
    """Leave the process group, for good: DeepSpeed keeps references to it and cannot start a second one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def set_timeouts(timeout_s: float) -> None:
    """Bound the collectives of training; torch gives a new group 10 (NCCL) or 30 minutes (gloo)."""
    for group in list(_world.pg_map):
        if group.group_desc != HOST_GROUP:
            _set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)
