"""Statistics of paired runs: differences with intervals, power laws, equivalent dense sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
_LARGEST = 1e15  # parameters; a larger equivalent size is only noise


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval. `low` and `high` are None with a single seed."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f}{bounds}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values with Student's t interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None, None)
    half = float(stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean, mean - half, mean + half)


def paired_difference(runs: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean of `runs - baseline` over their common seeds, with the interval of the paired t-test."""
    return mean_interval([runs[seed] - baseline[seed] for seed in sorted(runs.keys() & baseline.keys())])


class PowerLaw(NamedTuple):
    """`y = scale * x ** exponent`, a least-squares fit of the logarithms, averaged over seeds."""

    exponent: Interval  # with the interval over seeds
    scale: float
    residuals: tuple[float, ...]  # of the mean over seeds of log y, in the order of x

    @property
    def may_be_flat(self) -> bool:
        """Whether the exponent is not significantly below zero; always true with a single seed."""
        return self.exponent.high is None or self.exponent.high >= 0


def fit_power_law(x: Sequence[float], losses: Sequence[Mapping[int, float]]) -> PowerLaw | None:
    """Fit losses by seed at two or more x, over their common seeds; None if there is no common seed.

    The interval is over seeds, not over points, because the points of one seed are not independent.
    """
    seeds = sorted(set.intersection(*map(set, losses)))
    if not seeds:
        return None
    log_x, log_y = np.log(x), np.log([[some[seed] for some in losses] for seed in seeds])
    fits: list[Any] = [stats.linregress(log_x, of_seed) for of_seed in log_y]
    exponent = mean_interval([float(fit.slope) for fit in fits])
    intercept = float(np.mean([fit.intercept for fit in fits]))
    residuals = log_y.mean(0) - (intercept + exponent.mean * log_x)
    return PowerLaw(exponent, math.exp(intercept), tuple(map(float, residuals)))


def equivalent_size(runs: Mapping[int, float], dense: Mapping[int, Mapping[int, float]]) -> Interval | None:
    """Parameters of the dense model with the same loss as `runs`, from a power law fitted to each seed.

    `runs` maps seeds to losses, and so does `dense` for each dense size. The result is the geometric mean
    over the seeds that all of them have in common. It is None if there are fewer than two sizes or no such
    seed, or if for any seed the loss does not fall with size or the equivalent size is not between 1 and
    `_LARGEST`, because leaving out only that seed would select seeds by their outcome.
    """
    if len(dense) < 2:
        return None
    log_sizes = []
    for seed in sorted(runs.keys() & set.intersection(*map(set, dense.values()))):
        law = fit_power_law(list(dense), [{seed: losses[seed]} for losses in dense.values()])
        if law is None or law.exponent.mean >= 0:
            return None
        log_sizes.append(math.log(runs[seed] / law.scale) / law.exponent.mean)
    if not log_sizes or min(log_sizes) <= 0 or max(log_sizes) >= math.log(_LARGEST):
        return None
    mean, low, high = mean_interval(log_sizes)
    bounds = (None if bound is None else math.exp(bound) for bound in (low, high))
    return Interval(math.exp(mean), *bounds)
