"""Statistics of paired runs: differences with intervals, power laws, equivalent dense sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
_LARGEST = 1e15  # parameters; what is beyond is noise


class Interval(NamedTuple):
    """An estimate with its 95 % interval; `low` and `high` are None where a single seed tells no spread."""

    mean: float
    low: float | None
    high: float | None


def with_bounds(value: Interval) -> str:
    """Four digits, and the bounds where there are any."""
    if value.low is None or value.high is None:
        return f"{value.mean:+.4f}"
    return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's t interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None, None)
    half = float(stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def paired_difference(runs: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean of `runs - baseline` over the seeds that both have, with the interval of the paired t-test."""
    return mean_interval([runs[seed] - baseline[seed] for seed in sorted(runs.keys() & baseline.keys())])


class PowerLaw(NamedTuple):
    """`y = scale * x ** exponent`, by least squares of logarithms.

    Attributes:
        exponent: mean of the seeds' own, with the interval over seeds.
        scale: of the fit to the mean over seeds of log y, whose exponent is the mean one.
        residuals: of log y, of that fit, in the order of x.
    """

    exponent: Interval
    scale: float
    residuals: tuple[float, ...]

    @property
    def may_be_flat(self) -> bool:
        """Whether the exponent is not below zero beyond doubt; one seed leaves doubt."""
        return self.exponent.high is None or self.exponent.high >= 0


def fit_power_law(x: Sequence[float], losses: Sequence[Mapping[int, float]]) -> PowerLaw | None:
    """Fit losses by seed at two or more x, over the seeds that all of them have; None where there is none.

    Seeds, not points, are what the interval counts: the points of one seed share its luck.
    """
    seeds = sorted(set.intersection(*(set(some) for some in losses)))
    if not seeds:
        return None
    log_x = np.log(x)
    log_y = np.log([[some[seed] for some in losses] for seed in seeds])
    fits: list[Any] = [stats.linregress(log_x, of_seed) for of_seed in log_y]
    exponent = mean_interval([float(fit.slope) for fit in fits])
    intercept = float(np.mean([fit.intercept for fit in fits]))
    residuals = log_y.mean(0) - (intercept + exponent.mean * log_x)
    return PowerLaw(exponent, math.exp(intercept), tuple(map(float, residuals)))


def equivalent_size(runs: Mapping[int, float], dense: Mapping[int, Mapping[int, float]]) -> Interval | None:
    """Parameters of the dense model of the same loss as `runs`, seed by seed, averaged as logarithms.

    Args:
        runs: loss by seed.
        dense: of each dense size, loss by seed.

    Returns:
        Over the seeds that all sizes have. None where there is no such seed, or less than two sizes, or a
        seed whose loss does not fall with size, or so slowly that it gives no size between 1 and `_LARGEST`:
        without it, the others would be chosen by their outcome.
    """
    seeds = runs.keys() & set.intersection(*(set(losses) for losses in dense.values())) if dense else set()
    sizes = []
    for seed in sorted(seeds):
        of_seed = [{seed: losses[seed]} for losses in dense.values()]
        law = fit_power_law(list(dense), of_seed) if len(dense) > 1 else None
        if law is None or law.exponent.mean >= 0:
            return None
        log_size = math.log(runs[seed] / law.scale) / law.exponent.mean
        if not 0 < log_size < math.log(_LARGEST):
            return None
        sizes.append(log_size)
    if not sizes:
        return None
    mean, low, high = mean_interval(sizes)
    return Interval(
        math.exp(mean), None if low is None else math.exp(low), None if high is None else math.exp(high)
    )
