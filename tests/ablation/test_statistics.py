"""Differences of paired runs, power laws and equivalent sizes, against hand-worked and planted ones."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from moe.ablation.statistics import PowerLaw, equivalent_size, fit_power_law, mean_interval, paired_difference

RUNS = {0: 3.21, 1: 3.25, 2: 3.18, 3: 3.30}
BASE = {0: 3.26, 1: 3.28, 2: 3.24, 3: 3.33}


def fitted(x: Sequence[float] | np.ndarray, losses: Sequence[Mapping[int, float]]) -> PowerLaw:
    """The law that there must be."""
    law = fit_power_law([float(size) for size in x], losses)
    assert law is not None
    return law


def test_the_paired_interval_is_that_of_the_paired_t_test():
    expected = stats.ttest_rel(list(RUNS.values()), list(BASE.values()))
    interval = expected.confidence_interval(0.95)
    found = paired_difference(RUNS, BASE)
    assert found.mean == pytest.approx(np.mean([-0.05, -0.03, -0.06, -0.03]))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_seeds_that_only_one_side_has_do_not_count():
    assert paired_difference(RUNS | {9: 99.0}, BASE) == paired_difference(RUNS, BASE)
    assert paired_difference({-1: 99.0} | RUNS, BASE) == paired_difference(RUNS, BASE)


def test_runs_are_paired_by_seed_in_whatever_order_they_come():
    backwards = dict(reversed(RUNS.items()))
    assert paired_difference(backwards, BASE) == paired_difference(RUNS, BASE)


def test_the_mean_of_three_values_by_hand():
    # Mean 2, standard deviation 1, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.302653.
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), rel=1e-6)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval():
    assert mean_interval([1.5]) == (1.5, None, None)


def test_a_planted_power_law_is_recovered():
    x = np.array([1e6, 3e6, 1e7, 5e7])
    law = fitted(x, [{0: y} for y in 20.0 * x**-0.12])
    assert law.exponent == (pytest.approx(-0.12), None, None)
    assert law.scale == pytest.approx(20.0)
    assert max(map(abs, law.residuals)) < 1e-12


def test_the_exponents_interval_holds_the_planted_one_in_about_95_of_100_noisy_fits():
    rng, x, held = np.random.default_rng(0), np.geomspace(1e6, 1e8, 6), 0
    for _ in range(400):
        luck = rng.normal(0, 0.1, 3)  # that all points of a seed share
        losses = [
            {seed: 20 * size**-0.12 * np.exp(luck[seed] + rng.normal(0, 0.01)) for seed in range(3)}
            for size in x
        ]
        exponent = fitted(x, losses).exponent
        assert exponent.low is not None
        assert exponent.high is not None
        held += exponent.low <= -0.12 <= exponent.high
    assert 0.92 <= held / 400 <= 0.98


def test_the_exponents_interval_by_hand():
    # log x = 0, 1, 2; log y = 0, -1, -2 on seed 0; 0, -1.1, -3 on seed 1; 0, -1.8, -4 on seed 2: slopes -1,
    # -1.5 and -2, standard deviation 0.5. Of the mean, 0, -1.3, -3: residuals -1/15, 2/15, -1/15.
    logs = [(0, 0, 0), (-1, -1.1, -1.8), (-2, -3, -4)]
    law = fitted(
        [1.0, math.e, math.e**2], [{seed: math.exp(y) for seed, y in enumerate(some)} for some in logs]
    )
    half = 4.302653 * 0.5 / math.sqrt(3)
    assert law.exponent == pytest.approx((-1.5, -1.5 - half, -1.5 + half), rel=1e-5)
    assert law.residuals == pytest.approx((-1 / 15, 2 / 15, -1 / 15))
    assert not law.may_be_flat


def test_a_law_may_be_flat_where_its_interval_reaches_zero():
    x = [1.0, math.e]
    steep = fitted(x, [{0: 3.0, 1: 3.1}, {0: 2.0, 1: 2.0}])
    unclear = fitted(x, [{0: 3.0, 1: 3.1}, {0: 2.0, 1: 3.0}])
    assert (steep.may_be_flat, unclear.may_be_flat) == (False, True)
    assert fitted(x, [{0: 3.0}, {0: 3.1}]).may_be_flat
    assert fitted(x, [{0: 3.0}, {0: 2.9}]).may_be_flat  # one seed tells no spread


def test_a_law_counts_seeds_that_all_points_have():
    law = fitted([1.0, 10.0], [{0: 8.0, 1: 9.0}, {0: 4.0, 2: 1.0}])
    assert law.exponent.low is None
    assert law.scale == pytest.approx(8.0)
    assert law.exponent.mean == pytest.approx(math.log10(0.5))
    assert fit_power_law([1.0, 10.0], [{0: 8.0}, {1: 4.0}]) is None


def test_a_planted_equivalent_size_is_recovered_seed_by_seed():
    dense = {int(size): {seed: (5 + seed) * size**-0.1 for seed in range(3)} for size in (1e6, 4e6, 9e6)}
    runs = {seed: (5 + seed) * 2.5e6**-0.1 for seed in range(3)}  # worth 2.5M on every seed
    found = equivalent_size(runs, dense)
    assert found == pytest.approx((2.5e6, 2.5e6, 2.5e6))


def test_dense_runs_that_do_not_improve_with_size_tell_no_equivalent():
    assert equivalent_size({0: 3.0}, {10**6: {0: 3.0}, 2 * 10**6: {0: 3.1}}) is None
    assert equivalent_size({0: 3.0}, {10**6: {0: 3.2}}) is None
    assert equivalent_size({0: 3.0}, {}) is None
    # One of two seeds does not improve: the other one alone would be a choice by its outcome.
    assert equivalent_size({0: 3.0, 1: 3.0}, {10**6: {0: 3.2, 1: 3.1}, 2 * 10**6: {0: 2.9, 1: 3.15}}) is None
    # Improves by so little that the size is beyond all floats.
    assert equivalent_size({0: 2.7}, {10**6: {0: 2.83}, 2 * 10**6: {0: 2.82998}}) is None


def test_only_seeds_that_every_dense_size_has_count():
    dense = {10**6: {0: 3.2, 1: 9.9}, 4 * 10**6: {0: 2.8}}
    assert equivalent_size({0: (3.2 * 2.8) ** 0.5, 1: 3.0}, dense) == (pytest.approx(2e6), None, None)
