"""Scaling laws, against points of their papers."""

import math

import pytest

from moe.accounting.scaling_laws import chinchilla_loss, compute_optimal, effective_params


def test_chinchillas_own_point():
    assert chinchilla_loss(70e9, 1.4e12) == pytest.approx(1.9739, abs=5e-5)


def test_128_experts_make_5_million_parameters_worth_about_52_million():
    assert effective_params(5e6, 128) == pytest.approx(52e6, rel=0.01)  # the paper rounds to 55M


def test_one_expert_is_worth_itself_and_more_are_worth_more():
    for size in (15e6, 1.3e9):
        assert effective_params(size, 1) == pytest.approx(size)
        worth = [effective_params(size, experts) for experts in (1, 2, 8, 64, 512)]
        assert worth == sorted(worth)


def test_the_gain_of_routing_shrinks_with_size():
    assert effective_params(1e9, 64) / 1e9 < effective_params(1e8, 64) / 1e8


@pytest.mark.parametrize("flops", [1e19, 5.76e23])
def test_the_optimum_spends_the_budget_and_no_neighbour_is_better(flops):
    params, tokens = compute_optimal(flops)
    assert 6 * params * tokens == pytest.approx(flops)
    best = chinchilla_loss(params, tokens)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert chinchilla_loss(params * factor, tokens / factor) > best


def test_the_optimum_grows_as_the_exponents_say():
    smaller, larger = compute_optimal(1e20)[0], compute_optimal(1e22)[0]
    assert math.log10(larger / smaller) / 2 == pytest.approx(0.3658 / (0.3478 + 0.3658))
