"""What cells show together: paired differences, fits, and curves along one setting."""

import pytest

from moe.accounting.counts import count_parameters
from tests.support.finished_runs import comparisons_of, config_of, write_run


def test_differences_are_paired_with_the_dense_cell_of_equal_flops(ablation):
    (found,) = comparisons_of(ablation)
    assert found.baseline is not None
    assert found.baseline.label == "dense,width=512"
    # By hand. 8 experts: -0.10 at every seed. 4: -0.05, -0.04, -0.06, standard deviation 0.01. t = 4.302653.
    eight, four = found.differences["num_experts=8"], found.differences["num_experts=4"]
    assert eight == pytest.approx((-0.10, -0.10, -0.10))
    half = 4.302653 * 0.01 / 3**0.5
    assert four == pytest.approx((-0.05, -0.05 - half, -0.05 + half), rel=1e-5)
    # 16: -0.09, -0.14, -0.08: mean -0.10333, standard deviation 0.0321455.
    half = 4.302653 * 0.0321455 / 3**0.5
    assert found.differences["num_experts=16"] == pytest.approx(
        (-0.31 / 3, -0.31 / 3 - half, -0.31 / 3 + half), rel=1e-5
    )


def test_a_planted_power_law_is_found_along_the_experts_of_equal_flops_only(tmp_path):
    for experts in (1, 2, 4, 8, 16, 32):
        settings = ["moe.top_k=1", "moe.d_ff_expert=512"] if experts == 1 else []
        settings = [f"moe.num_experts={experts}", *settings]
        loss = 20 * count_parameters(config_of(settings)).total ** -0.13
        write_run(tmp_path / f"{experts}", settings, 0, loss)
    (found,) = comparisons_of(tmp_path)
    (curve,) = found.curves
    assert (curve.key, len(curve.cells)) == ("moe.num_experts", 5)
    assert curve.law is not None
    assert curve.law.exponent == (pytest.approx(-0.13), None, None)
    assert max(map(abs, curve.law.residuals)) < 1e-9
    for experts in (2, 4, 8, 16, 32):  # of other FLOPs each: no law
        write_run(
            tmp_path / "wide" / f"{experts}",
            [
                f"moe.num_experts={experts}",
                "moe.top_k=1",
                "moe.normalize_gate_weights=false",
                f"moe.d_ff_expert={64 * experts}",
            ],
            0,
            3.0,
        )
    (found,) = comparisons_of(tmp_path)
    assert [curve.law for curve in found.curves if any("top_k=1" in cell.label for cell in curve.cells)] == [
        None
    ]


def test_curves_go_along_one_setting_at_a_time(tmp_path):
    for experts in (4, 8):
        for k in (2, 4):
            settings = [f"moe.num_experts={experts}", f"moe.top_k={k}", f"moe.d_ff_expert={512 // k}"]
            write_run(tmp_path / f"{experts}-{k}", settings, 0, 3.0)
    (found,) = comparisons_of(tmp_path)
    curves = {(curve.key, tuple(cell.label for cell in curve.cells)) for curve in found.curves}
    assert curves == {
        ("moe.num_experts", ("num_experts=4,top_k=2", "num_experts=8,top_k=2")),
        ("moe.num_experts", ("num_experts=4,top_k=4", "num_experts=8,top_k=4")),
        ("moe.top_k", ("num_experts=4,top_k=2", "num_experts=4,top_k=4")),
        ("moe.top_k", ("num_experts=8,top_k=2", "num_experts=8,top_k=4")),
    }


def test_a_curve_follows_the_width_only_where_nothing_else_tells_cells_apart(tmp_path):
    for experts in (4, 8):
        for width in (64, 128):
            settings = [f"moe.num_experts={experts}", f"moe.d_ff_expert={width}"]
            write_run(tmp_path / f"{experts}-{width}", settings, 0, 3.0)
    (found,) = comparisons_of(tmp_path)
    curves = {(curve.key, tuple(cell.label for cell in curve.cells)) for curve in found.curves}
    assert curves == {
        ("moe.num_experts", ("num_experts=4,width=64", "num_experts=8,width=64")),
        ("moe.num_experts", ("num_experts=4,width=128", "num_experts=8,width=128")),
        ("moe.d_ff_expert", ("num_experts=4,width=64", "num_experts=4,width=128")),
        ("moe.d_ff_expert", ("num_experts=8,width=64", "num_experts=8,width=128")),
    }


def test_granularities_are_compared_also_beside_another_setting(tmp_path):
    for g in (4, 1, 2):
        for weight in (0.0, 0.02):
            finer = [f"moe.num_experts={8 * g}", f"moe.top_k={2 * g}", f"moe.d_ff_expert={256 // g}"]
            write_run(tmp_path / f"{g}-{weight}", [*finer, f"moe.aux_loss_coef={weight}"], 0, 3.0)
    (found,) = comparisons_of(tmp_path)
    finer = [
        (curve.cells[0].config.moe.aux_loss_coef, [cell.config.moe.num_experts for cell in curve.cells])
        for curve in found.curves
        if not curve.key
    ]
    assert sorted(finer) == [(0.0, [8, 16, 32]), (0.02, [8, 16, 32])]
