"""A race by the clock: how many steps each cell gets, on which schedule, and from which measurement."""

import csv
import html
import json

import pytest

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import StepTime, plan_cells
from moe.ablation.comparison import rows
from moe.ablation.conclusions import conclusions
from moe.ablation.html_report import write_report
from moe.ablation.race import plan_race, race_table, raced, steps_in_time, stretched, uncertain
from moe.accounting.counts import count_parameters
from moe.config import ConfigError, changed, load_config
from moe.training.optimizer import learning_rate
from tests.support.finished_runs import comparisons_of
from tests.support.paths import TINY as TINY_FILE

TINY = load_config(TINY_FILE, ["model.vocab_size=1024"])


def time_of(seconds):
    return StepTime(seconds, 0.9 * seconds, 1.1 * seconds, 80)


class Stopwatch:
    """Takes the place of the measurement; keeps what it was asked for."""

    def __init__(self, **seconds: float):
        self.seconds = {"dense,equal_active": 0.2, "dense,double_active": 0.4, "dense,equal_total": 0.8}
        self.seconds |= {name.replace("experts_", "num_experts="): time for name, time in seconds.items()}
        self.asked: list[set[str]] = []

    def __call__(self, configs):
        self.asked.append(set(configs))
        assert all(config.train.steps == TINY.train.steps for config in configs.values())
        return {name: time_of(self.seconds[name]) for name in configs}


def cells_of(*experts, config=TINY):
    return plan_cells(config, {"moe.num_experts": list(experts)}, "active_flops")


def steps_by_name(cells):
    return {cell.name: cell.config.train.steps for cell in cells}


def test_a_step_time_is_the_median_with_its_quartiles():
    # By hand: of 1 to 9 the median is 5 and the quartiles are 3 and 7. Of a normal distribution these are
    # 0.6745 standard deviations from it, so that is 2.965; the median's error is 1.2533 of it over sqrt(9).
    time = StepTime.of([5.0, 1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0])
    assert time == (5.0, 3.0, 7.0, 9)
    assert time.uncertainty == pytest.approx(1.2533 * (2 / 0.6745) / 3 / 5, rel=1e-3)


@pytest.mark.parametrize(
    ("dense_steps", "dense_s", "cell_s", "steps"),
    [
        (1500, 0.25, 0.25, 1500),
        (1500, 0.25, 0.50, 750),
        (1500, 0.25, 0.20, 1875),  # a faster cell gets more
        (1000, 0.25, 0.30, 833),  # 833.3
        (1000, 0.30, 0.35, 857),  # 857.1
        (10, 0.1, 0.15, 7),  # 6.67: the nearest, not always the one below
        (2, 0.1, 9.0, 1),  # at least one
    ],
)
def test_steps_are_those_whose_time_is_nearest_to_that_of_the_dense_steps(
    dense_steps, dense_s, cell_s, steps
):
    assert steps_in_time(dense_steps, dense_s, cell_s) == steps


def test_a_stretched_schedule_keeps_the_shares_of_warm_up_evaluations_and_checkpoints():
    # tiny: 1,200 steps, warm-up 60, evaluated every 200, saved every 400.
    assert stretched(TINY, 1200) == changed(TINY, {"optim.warmup_steps": 60})
    half = stretched(TINY, 600)
    assert (half.train.steps, half.optim.warmup_steps) == (600, 30)
    assert (half.train.eval_interval, half.train.checkpoint_interval) == (100, 200)
    odd = stretched(TINY, 1037)  # 51.85; 172.8; 345.7: intervals are rounded up
    assert (odd.train.eval_interval, odd.train.checkpoint_interval, odd.optim.warmup_steps) == (173, 346, 52)
    assert changed(TINY, {"train.steps": 1037, "train.eval_interval": 173, "train.checkpoint_interval": 346,
                          "optim.warmup_steps": 52}) == odd  # fmt: skip
    assert stretched(TINY, 3).optim.warmup_steps == 1
    assert stretched(changed(TINY, {"optim.warmup_steps": 0}), 600).optim.warmup_steps == 0
    assert stretched(changed(TINY, {"train.eval_interval": 1}), 600).train.eval_interval == 1


@pytest.mark.parametrize("steps", [1, 2, 7, 59, 600, 1037, 1199, 1201, 5000])
@pytest.mark.parametrize("interval", [1, 7, 200, 1200, 5000])
def test_no_cell_is_evaluated_more_often_than_the_reference(steps, interval):
    reference = changed(TINY, {"train.eval_interval": interval})
    train = stretched(reference, steps).train
    evaluations = -(-train.steps // train.eval_interval)  # the last step is always evaluated
    assert 1 <= evaluations <= -(-1200 // interval)


@pytest.mark.parametrize("steps", [600, 1037, 1800])
def test_at_any_share_of_the_race_the_learning_rate_is_that_of_the_reference(steps):
    config = stretched(TINY, steps)
    peak = TINY.optim.lr
    assert learning_rate(config, steps - 1) == pytest.approx(peak * TINY.optim.min_lr_ratio)
    for share in (0.02, 0.1, 0.3, 0.5, 0.9):
        ours = learning_rate(config, round(share * steps) - 1)
        assert ours == pytest.approx(learning_rate(TINY, round(share * 1200) - 1), abs=0.02 * peak)


def test_every_cell_gets_the_time_of_the_dense_one(tmp_path):
    watch = Stopwatch(experts_8=0.25, experts_16=0.3)
    cells = plan_race(cells_of(8, 16), TINY, AblationFolder(tmp_path), watch)
    # 1,200 steps of 0.2 s are 240 s: 960 of 0.25 s, 800 of 0.3 s, 600 of 0.4 s, 300 of 0.8 s.
    assert steps_by_name(cells) == {
        "num_experts=8": 960,
        "num_experts=16": 800,
        "dense,equal_active": 1200,
        "dense,double_active": 600,
        "dense,equal_total": 300,
    }
    assert [cell.planned_seconds for cell in cells] == pytest.approx([240] * 5)
    assert {cell.config.warmup_steps / cell.config.train.steps for cell in cells} == {0.05}
    widths = {cell.name: cell.config.moe.d_ff_expert for cell in cells}
    assert widths["num_experts=8"] == widths["num_experts=16"] == 256  # of equal active FLOPs
    assert list(tmp_path.iterdir()) == []
    table = {row[0]: row[1:] for row in race_table(cells, TINY)}
    assert table["num_experts=16"] == ["300", "270 to 330", "80", "1.500", "40", "800", "819k", "240"]


def test_one_expert_of_the_race_is_the_dense_model_whose_time_counts(tmp_path):
    watch = Stopwatch(experts_1=0.5, experts_8=1.0)
    cells = plan_race(cells_of(1, 8), TINY, AblationFolder(tmp_path), watch)
    assert steps_by_name(cells)["num_experts=1"] == 1200
    assert steps_by_name(cells)["num_experts=8"] == 600


def test_a_recorded_plan_is_used_again_and_nothing_is_measured(tmp_path):
    folder = AblationFolder(tmp_path)
    cells = plan_race(cells_of(8, 16), TINY, folder, Stopwatch(experts_8=0.25, experts_16=0.3))
    folder.add_plan(cells, [0], {"race": {}})
    watch = Stopwatch(experts_8=9.9, experts_16=9.9)
    assert plan_race(cells_of(8, 16), TINY, folder, watch) == cells
    assert plan_race(cells_of(16), TINY, folder, watch) == cells[1:]
    assert watch.asked == []
    recorded = json.loads(folder.plan.read_text())["cells"]["num_experts=8"]
    assert recorded["step_time"] == {"seconds": 0.25, "low": 0.225, "high": 0.275, "steps": 80}
    assert recorded["config"]["train"]["steps"] == 960


def test_a_cell_that_joins_later_is_measured_against_the_dense_one_of_the_same_day(tmp_path):
    folder = AblationFolder(tmp_path)
    cells = plan_race(cells_of(1, 8), TINY, folder, Stopwatch(experts_1=0.2, experts_8=0.25))
    folder.add_plan(cells, [0], {"race": {}})
    slow_day = Stopwatch(experts_1=0.4, experts_16=0.6)  # twice as slow: 16 experts take 1.5 times as long
    later = plan_race(cells_of(1, 8, 16), TINY, folder, slow_day)
    assert slow_day.asked == [{"num_experts=1", "num_experts=16"}]
    assert later[:2] == cells[:2]
    (joined,) = (cell for cell in later if cell.name == "num_experts=16")
    assert joined.config.train.steps == 800
    assert joined.planned_seconds == pytest.approx(240)
    # Under another name the dense cell is still the one that was measured.
    other = Stopwatch(experts_32=0.9)
    other.seconds["dense,equal_active"] = 0.6
    found = plan_race(cells_of(8, 32), TINY, folder, other)
    assert other.asked == [{"dense,equal_active", "num_experts=32"}]
    assert steps_by_name(found)["num_experts=32"] == 800
    assert steps_by_name(found)["num_experts=8"] == 960


def test_other_settings_are_refused_before_anything_is_measured(tmp_path):
    folder = AblationFolder(tmp_path)
    cells = plan_race(cells_of(8), TINY, folder, Stopwatch(experts_8=0.25))
    folder.add_plan(cells, [0], {"race": {}})
    for key, value, was in (("optim.lr", 1e-3, "0.003"), ("train.steps", 600, "1200")):
        other, watch = changed(TINY, {key: value}), Stopwatch(experts_8=0.25, experts_16=0.3)
        with pytest.raises(ConfigError, match=rf"--out: .* {key} .*there, not .*; choose another folder"):
            plan_race(cells_of(8, 16, config=other), other, folder, watch)
        assert watch.asked == [], was


def test_a_folder_holds_races_or_equal_steps_under_one_set_of_conditions(tmp_path):
    race, steps = AblationFolder(tmp_path / "race"), AblationFolder(tmp_path / "steps")
    for folder in (race, steps):
        folder.check_race({"--jobs": 2})
        folder.check_race(None)
        folder.path.mkdir()
    race.add_plan(cells_of(8), [0], {"race": {"--jobs": 2}})
    steps.add_plan(cells_of(8), [0], {})
    race.check_race({"--jobs": 2})
    steps.check_race(None)
    with pytest.raises(
        ConfigError, match=r"^--hold: .*race was planned as a race by the clock; choose another"
    ):
        race.check_race(None)
    with pytest.raises(
        ConfigError, match=r"^--hold: .*steps was planned as no race, but equal steps; choose"
    ):
        steps.check_race({"--jobs": 2})
    with pytest.raises(ConfigError, match=r"^--jobs: 4, but step times in .* were measured with 2; use that"):
        race.check_race({"--jobs": 4})


def test_a_step_time_with_a_large_error_is_named():
    # By hand, of 81 steps: 0.929 x 0.2 / 9 = 2.1 % and 0.929 x 0.02 / 9 = 0.2 %.
    (first, second, *_) = cells_of(8, 16)
    dense = StepTime(1.0, 0.99, 1.01, 81)
    noisy, quiet = raced(first, StepTime(1.0, 0.9, 1.1, 81), dense), raced(second, dense, dense)
    assert "num_experts=8 2.1%" in uncertain([noisy, quiet])
    assert "num_experts=16" not in uncertain([noisy, quiet])
    assert uncertain([quiet]) == ""


def test_cells_of_a_race_are_compared_in_equal_time_though_their_steps_differ(race):
    (found,) = comparisons_of(race)
    assert found.is_race
    assert [cell.label for cell in found.cells] == ["dense,equal_active", "num_experts=8", "num_experts=16"]
    # The losses of SHAPES: 8 experts are better by 0.10 on every seed.
    assert found.differences["num_experts=8"] == pytest.approx((-0.10, -0.10, -0.10))
    assert found.worth == {}
    assert [curve.law for curve in found.curves] == [None]
    said = list(conclusions(found))
    assert said[0].startswith(
        "Equal time: each cell was planned for 1,200 seconds of training steps. dense,equal_active took "
        "1,200, the other cells 1.000 to 1.067 times that"
    )
    assert said[1].startswith("Not equal time: runs that took more than 3 % longer than those of dense")
    assert said[1].endswith(": num_experts=16 by 6.7%.")
    (better,) = (one for one in said if one.startswith("Better than dense,equal_active in equal time"))
    assert "num_experts=8 -0.1000 [-0.1000, -0.1000] (with 0.833 times its tokens)" in better
    assert "(with 0.667 times its tokens and 1.07 times its training time)" in better
    assert any(one.startswith("Consecutive cells along moe.num_experts in equal time: ") for one in said)
    assert not any("shorter than those" in one or "FLOPs" in one for one in said)


def test_without_its_plan_runs_of_different_steps_are_not_compared(race):
    (race / "plan.json").unlink()
    assert sorted(len(found.cells) for found in comparisons_of(race)) == [1, 1, 1]


def test_the_table_of_a_race_has_planned_and_real_seconds(race):
    said = write_report(race)
    page = (race / "report.html").read_text()
    assert "each planned for 1,200 seconds of training on stdlib" in page
    assert all(html.escape(one) in page for one in said)
    with (race / "results.csv").open() as file:
        table = {row["cell"]: row for row in csv.DictReader(file)}
    sixteen = table["num_experts=16"]
    assert (sixteen["steps"], float(sixteen["tokens"])) == ("800", 800 * 1024)
    assert float(sixteen["flops"]) == pytest.approx(
        800 * 1024 * count_parameters(changed(TINY, {"moe.num_experts": 16})).flops_per_token_train
    )
    numbers = ("planned_step_ms", "step_ms", "planned_seconds", "seconds", "seconds_min", "seconds_max")
    assert [float(sixteen[key]) for key in numbers] == pytest.approx([1500, 1600, 1200, 1280, 1280, 1280])
    assert float(sixteen["seconds_to_baseline"]) == pytest.approx(1280 / 1200)


def test_an_ablation_without_a_race_has_no_planned_seconds(ablation):
    (found,) = comparisons_of(ablation)
    assert not found.is_race
    table = {row["cell"]: row for row in rows(found)}
    assert table["num_experts=8"]["planned_seconds"] is None
    # 1,200 steps of 1,024 tokens at 800 tokens/s.
    assert table["num_experts=8"]["seconds"] == pytest.approx(1200 * 1024 / 800)
