"""Which finished runs make up a cell, and what it is called."""

import json

import pytest

from moe.ablation.html_report import write_report
from moe.ablation.results import read_runs, training_seconds
from moe.config import ConfigError
from tests.support.finished_runs import SHAPES, comparisons_of, write_run


def test_runs_that_differ_in_their_seed_are_a_cell_named_by_what_differs(ablation):
    ((*cells,),) = [found.cells for found in comparisons_of(ablation)]
    labels = ["dense,width=512", "dense,width=2048", "num_experts=4", "num_experts=8", "num_experts=16"]
    assert [cell.label for cell in cells] == labels
    assert [sorted(cell.runs) for cell in cells] == [[0, 1, 2]] * 5
    assert cells[2].mean("moe/load_imbalance") == 2.0  # the last tenth of twelve lines is one
    assert cells[2].mean("moe/dead_experts") == 0.0  # a value like any other


def test_dense_runs_of_another_width_are_another_cell_also_by_shared_experts(tmp_path):
    write_run(tmp_path / "a", [*SHAPES["dense"][0]], 0, 3.0)
    write_run(tmp_path / "b", [*SHAPES["dense"][0], "moe.num_shared_experts=1"], 0, 2.9)
    (found,) = comparisons_of(tmp_path)
    totals = [cell.counts.total for cell in found.cells]
    assert totals[1] - totals[0] == 4 * 3 * 128 * 512  # by hand: layers, matrices, their sides


def test_cells_of_an_ablation_keep_its_names_and_a_dense_one_is_marked(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "num_experts=1" / f"seed-{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / "runs" / "anything" / f"seed-{seed}", SHAPES["8"][0], seed, 2.9)
    (found,) = comparisons_of(tmp_path)
    assert [cell.label for cell in found.cells] == ["num_experts=1 (dense)", "anything"]


def test_dense_runs_that_differ_in_routing_are_one_cell_and_a_copy_is_left_out(tmp_path):
    write_run(tmp_path / "a", SHAPES["dense"][0], 0, 3.0)
    write_run(tmp_path / "b", [*SHAPES["dense"][0], "moe.aux_loss_coef=0.5"], 1, 3.1)
    write_run(tmp_path / "c", SHAPES["dense"][0], 0, 3.2)
    (found,) = comparisons_of(tmp_path)
    assert [cell.losses for cell in found.cells] == [{0: 3.0, 1: 3.1}]
    assert write_report(tmp_path)[0] == "Left out because another run has the same settings and seed: c."


def test_what_is_no_run_is_refused(ablation):
    with pytest.raises(ConfigError, match="holds no finished run"):
        read_runs(ablation / "dense-0" / "checkpoints")
    for summary in ("{", "{}", "[]"):
        (ablation / "dense-0" / "summary.json").write_text(summary)
        with pytest.raises(ConfigError, match=r"but not a complete run of train\.py"):
            read_runs(ablation)


def test_training_seconds_add_up_the_logged_steps_and_leave_out_what_is_between_them():
    lines = [
        {"step": 1, "perf/step_s": 5.0},  # the first step is slow, and stands for itself alone
        {"step": 4, "eval/loss": 3.0},
        {"step": 10, "perf/step_s": 0.2},  # for steps 2 to 10
        {"step": 10, "eval/loss": 2.9},
        {"step": 20, "perf/step_s": 0.1},  # for steps 11 to 20
        {"step": 23, "perf/step_s": 0.4},  # the last one; for 21 to 23
        {"step": 23, "eval/loss": 2.8},
    ]
    # 5; 5 + 3 x 0.2; 5 + 9 x 0.2; 6.8 + 10 x 0.1; 7.8 + 3 x 0.4.
    assert training_seconds(lines) == pytest.approx({1: 5.0, 4: 5.6, 10: 6.8, 20: 7.8, 23: 9.0})


@pytest.mark.parametrize(("lines", "mean"), [(5, 4.0), (19, 18.0), (20, 18.5), (40, 37.5)])
def test_a_mean_is_that_of_the_last_tenth_of_the_log_and_at_least_of_one_line(tmp_path, lines, mean):
    write_run(tmp_path / "a", SHAPES["8"][0], 0, 2.9)
    logged = [{"step": step + 1, "moe/load_imbalance": float(step)} for step in range(lines)]
    text = "".join(json.dumps(line | {"tokens": 1, "loss/lm": 4.0}) + "\n" for line in logged)
    (tmp_path / "a" / "metrics.jsonl").write_text(text)
    ((cell,),) = [found.cells for found in comparisons_of(tmp_path)]
    assert cell.mean("moe/load_imbalance") == mean
