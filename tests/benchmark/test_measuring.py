"""Turns, budgets, quartiles and peak memory."""

import gc
import time

import pytest
import torch

from moe.benchmark.measuring import in_turns, peak_bytes, spread_ms

CPU = torch.device("cpu")
MIB = 2**20


def empty(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_each_round_begins_with_another_one():
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    in_turns(runs, 4)
    assert "".join(called) == "abc" + "bca" + "cab" + "abc"


def test_what_they_return_is_kept_by_name():
    numbers = iter(range(100))
    assert in_turns({"a": lambda: next(numbers), "b": lambda: -next(numbers)}, 2) == {
        "a": [0, 3],
        "b": [-1, -2],
    }


def test_over_its_budget_one_is_called_no_more_but_at_least_once():
    runs = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    results = in_turns(runs, 5, budget_s=0.01)
    assert (len(results["slow"]), len(results["fast"])) == (1, 5)


def test_the_garbage_collector_is_off_meanwhile_and_on_again_after_an_error():
    assert in_turns({"": gc.isenabled}, 2) == {"": [False, False]}
    with pytest.raises(ZeroDivisionError):
        in_turns({"": lambda: 1 // 0}, 1)
    assert gc.isenabled()


def test_quartiles_are_in_milliseconds():
    spread = spread_ms([0.001, 0.002, 0.003, 0.004, 0.009])
    assert spread.median == pytest.approx(3)
    assert spread.quartiles == pytest.approx([2, 4])
    assert spread_ms([0.5]) == pytest.approx((500, 500, 500))


def test_the_peak_is_of_what_exists_at_once():
    def run():
        first, second = empty(1), empty(4)
        del second
        third = empty(3)
        del first, third

    assert peak_bytes(run, list, CPU) == 5 * MIB


def test_what_it_leaves_behind_is_not_counted_even_at_the_peak():
    """Subtracting it from the peak would give 0: at the peak it did not exist."""
    left = []

    def run():
        temporary = empty(4)
        del temporary
        left.append(empty(4))

    assert peak_bytes(run, lambda: left, CPU) == 4 * MIB
    left.clear()
    assert peak_bytes(run, list, CPU) == 4 * MIB


def test_tensors_that_are_older_do_not_lower_the_peak_below_zero():
    older = [empty(8)]
    assert peak_bytes(older.clear, list, CPU) == 0


def test_the_profiler_prints_nothing(capfd):
    peak_bytes(lambda: None, list, CPU)
    print("after")
    assert capfd.readouterr() == ("after\n", "")
