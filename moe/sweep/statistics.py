"""Statistics of paired runs: differences with intervals, power laws, equivalent dense sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


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
    """`y = scale * x ** exponent`, fitted by least squares of logarithms; residuals are of log y."""

    exponent: Interval
    scale: float
    residuals: tuple[float, ...]

    def solve(self, y: float) -> float:
        """The x at which the law gives y."""
        return (y / self.scale) ** (1 / self.exponent.mean)


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit at least two points; two are met exactly and leave no interval of the exponent."""
    log_x, log_y = np.log(x), np.log(y)
    fit: Any = stats.linregress(log_x, log_y)
    exponent = Interval(float(fit.slope), None, None)
    if len(x) > 2:
        half = float(fit.stderr * stats.t.ppf((1 + LEVEL) / 2, len(x) - 2))
        exponent = Interval(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)
    residuals = log_y - (fit.intercept + fit.slope * log_x)
    return PowerLaw(exponent, math.exp(float(fit.intercept)), tuple(map(float, residuals)))


def equivalent_size(runs: Mapping[int, float], dense: Mapping[int, Mapping[int, float]]) -> Interval | None:
    """Parameters of the dense model of the same loss as `runs`, seed by seed, averaged as logarithms.

    Args:
        runs: loss by seed.
        dense: of each dense size, loss by seed.

    Returns:
        Over the seeds that all sizes have. None where there is no such seed, or less than two sizes, or a
        seed whose loss does not fall with size: without it, the others would be chosen by their outcome.
    """
    seeds = runs.keys() & set.intersection(*(set(losses) for losses in dense.values())) if dense else set()
    sizes = []
    for seed in sorted(seeds):
        law = (
            fit_power_law(list(dense), [losses[seed] for losses in dense.values()])
            if len(dense) > 1
            else None
        )
        if law is None or law.exponent.mean >= 0:
            return None
        sizes.append(math.log(law.solve(runs[seed])))
    if not sizes:
        return None
    mean, low, high = mean_interval(sizes)
    return Interval(
        math.exp(mean), None if low is None else math.exp(low), None if high is None else math.exp(high)
    )
