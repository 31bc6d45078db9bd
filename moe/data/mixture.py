"""Which source each sample of a training run comes from: a function of the seed and of its place in the run.

The places are cut into cycles of `CYCLE`. At the end of each cycle every source has had its share of all
samples so far, rounded down, and the source with the largest weight the rest; within a cycle the sources are
shuffled. Where the weights change, the shares are counted anew.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moe.config import Config

CYCLE = 1000  # samples


class _Phase(NamedTuple):
    """The places from `first` to before `last`: their weights, and the samples of each source before them."""

    first: int
    last: float
    weights: tuple[float, ...]
    before: np.ndarray


def draw(config: Config, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sources of some samples of a run.

    Args:
        config: of the run, with `data.sources`.
        places: (n,) int64 of the samples; 0 is the first sample of the first step.

    Returns:
        The source of each, (n,) int64, numbered as in `data.sources`; and how many samples of that source
        come before it in the run, (n,) int64.
    """
    sources, earlier = np.empty_like(places), np.empty_like(places)
    for phase in _phases(config):
        cycles, rests = np.divmod(places - phase.first, CYCLE)
        inside = (places >= phase.first) & (places < phase.last)
        for number in np.unique(cycles[inside]):
            here = inside & (cycles == number)
            in_cycle, counts = _cycle(config.run.seed, phase.first, phase.weights, int(number))
            sources[here], earlier[here] = in_cycle[rests[here]], counts[rests[here]]
            earlier[here] += phase.before[sources[here]]
    return sources, earlier


def samples_drawn(config: Config, steps: int) -> dict[str, int]:
    """How many samples of each source come up in the first steps."""
    places = steps * config.train.global_batch_size
    phase = [phase for phase in _phases(config) if phase.first <= places][-1]
    counts = phase.before + _counts_after(config.run.seed, phase.first, phase.weights, places - phase.first)
    return dict(zip(config.data.sources, counts.tolist(), strict=True))


def _phases(config: Config) -> Iterator[_Phase]:
    data, weights = config.data, tuple(config.data.weights_at(0).values())
    none = np.zeros(len(weights), dtype=np.int64)
    if data.anneal_step is None:
        yield _Phase(0, float("inf"), weights, none)
        return
    change = data.anneal_step * config.train.global_batch_size
    yield _Phase(0, change, weights, none)
    before = _counts_after(config.run.seed, 0, weights, change)
    yield _Phase(change, float("inf"), tuple(data.weights_at(data.anneal_step).values()), before)


def _counts_after(seed: int, first: int, weights: tuple[float, ...], samples: int) -> np.ndarray:
    """Samples of each source among the first ones of a phase, (sources,) int64."""
    number, rest = divmod(samples, CYCLE)
    in_cycle, _ = _cycle(seed, first, weights, number)
    return _shares(weights, number * CYCLE) + np.bincount(in_cycle[:rest], minlength=len(weights))


@lru_cache(maxsize=64)
def _cycle(seed: int, first: int, weights: tuple[float, ...], number: int) -> tuple[np.ndarray, np.ndarray]:
    """The sources of a cycle, and how many samples of the same source the phase has before each."""
    before, after = _shares(weights, number * CYCLE), _shares(weights, (number + 1) * CYCLE)
    sources = np.repeat(np.arange(len(weights)), after - before)
    sources = np.random.Generator(np.random.PCG64([seed, first, number])).permutation(sources)
    earlier = np.empty_like(sources)
    for source, count in enumerate(before):
        of_it = sources == source
        earlier[of_it] = count + np.arange(of_it.sum())
    return sources, earlier


def _shares(weights: tuple[float, ...], samples: int) -> np.ndarray:
    """How many of the first samples each source has, (sources,) int64, after whole cycles."""
    shares = np.array(weights) / sum(weights)
    counts = np.floor(shares * samples).astype(np.int64)
    counts[shares.argmax()] += samples - counts.sum()
    return counts
