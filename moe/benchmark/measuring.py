"""Clocks, turns, spread and peak memory: what makes the figures of several contenders comparable."""

import ctypes
import gc
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._C._profiler import _EventType

_Result = TypeVar("_Result")


def now(device: torch.device) -> float:
    """Seconds on a clock, read after the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def in_turns(
    runs: Mapping[str, Callable[[], _Result]], repeats: int, budget_s: float = math.inf
) -> dict[str, list[_Result]]:
    """Call each of several functions again and again, one after the other, each round in another order.

    So what disturbs the machine for a while, or what one call leaves in the caches, does not always meet the
    same one. The garbage collector is off meanwhile.

    Args:
        runs: the functions by name.
        repeats: how often each is called at most.
        budget_s: seconds of one function after which it is not called again. Each is called at least once.

    Returns:
        What they returned, by name.
    """
    names, spent = list(runs), dict.fromkeys(runs, 0.0)
    results: dict[str, list[_Result]] = {name: [] for name in runs}
    with _no_garbage_collection():
        for turn in range(repeats):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if results[name] and spent[name] >= budget_s:
                    continue
                started = time.perf_counter()
                results[name].append(runs[name]())
                spent[name] += time.perf_counter() - started
    return results


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class Spread(NamedTuple):
    """Median and quartiles of repeated measurements."""

    low: float
    median: float
    high: float

    @property
    def quartiles(self) -> list[float]:
        """The first and the third."""
        return [self.low, self.high]


def spread_ms(seconds: Sequence[float]) -> Spread:
    """Median and quartiles, in milliseconds."""
    return Spread(*(1e3 * float(value) for value in np.percentile(seconds, (25, 50, 75))))


def peak_bytes(run: Callable[[], None], leaves: Callable[[], list[Tensor]], device: torch.device) -> int:
    """The most memory that tensors take while `run` runs, beyond what they took before.

    On a CPU it follows each allocation and release that torch's profiler records. What libraries allocate for
    themselves is not in it, nor what an allocator keeps.

    Args:
        run: what is measured.
        leaves: tensors that `run` has made and that are not to be counted, such as gradients of weights. On a
            CPU they are left out from the moment they exist, on a GPU they are subtracted from the peak.
        device: of the tensors.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        peak = torch.cuda.max_memory_allocated(device) - before
        return peak - sum(tensor.numel() * tensor.element_size() for tensor in leaves())
    profile = torch.autograd.profiler.profile(profile_memory=True)
    with _quiet(), profile:
        run()
    assert profile.kineto_results is not None
    events = _allocations(profile.kineto_results.experimental_event_tree())
    changes = [
        (event.extra_fields.ptr, event.extra_fields.alloc_size)
        for event in sorted(events, key=lambda event: event.start_time_ns)
    ]
    last = {address: i for i, (address, size) in enumerate(changes) if size > 0}
    uncounted = {last.get(tensor.untyped_storage().data_ptr()) for tensor in leaves()}
    sizes = [0 if i in uncounted else size for i, (_, size) in enumerate(changes)]
    return max(itertools.accumulate(sizes, initial=0))


def _allocations(events: Iterable[Any]) -> Iterator[Any]:
    """Those among the events of a profile, which form a tree. A release is one of negative size."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event
        yield from _allocations(event.children)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch 2.13 prints two lines, from C++, whenever it profiles, and warns of older tensors."""
    flush, places = ctypes.CDLL(None).fflush, (1, 2)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(place) for place in places]
    with open(os.devnull, "w") as nowhere:
        for place in places:
            os.dup2(nowhere.fileno(), place)
    try:
        yield
    finally:
        flush(None)
        for place, copy in zip(places, kept, strict=True):
            os.dup2(copy, place)
            os.close(copy)
