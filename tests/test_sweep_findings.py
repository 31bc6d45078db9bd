import csv
import html
import json
import re
from pathlib import Path

import pytest

from moe.ablation.comparison import analyse
from moe.ablation.conclusions import sentences
from moe.ablation.html_report import write_report
from moe.ablation.results import read_runs
from moe.accounting.counts import count
from moe.config import ConfigError, dump_config, load_config

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
SHAPES = {  # losses of seeds 0, 1, 2
    "dense": (["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=512"], (3.00, 3.04, 2.96)),
    "dense,large": (["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=2048"], (2.80, 2.85, 2.76)),
    "4": (["moe.num_experts=4"], (2.95, 3.00, 2.90)),
    "8": (["moe.num_experts=8"], (2.90, 2.94, 2.86)),
    "16": (["moe.num_experts=16"], (2.91, 2.90, 2.88)),
}
COST = {"device_hours": 0.5, "usd": 1.5, "kwh": None, "tco2e": None}


def findings_of(folder):
    return analyse(read_runs(folder)[0])


def config_of(settings):
    return load_config(TINY, ["model.vocab_size=1024", *settings])


def write_run(folder, settings, seed, loss, tokens_per_s=1000.0):
    """The files of a finished run, in the format of README.md."""
    folder.mkdir(parents=True)
    config = config_of([*settings, f"run.seed={seed}", f"run.dir='{folder}'"])
    (folder / "config.yaml").write_text(dump_config(config))
    lines = []
    for step in range(100, 1300, 100):
        line = {"step": step, "tokens": step * 1024, "loss/lm": 4.0, "perf/step_s": 1024 / tokens_per_s}
        if not config.moe.is_dense:
            line |= {"moe/load_imbalance": 2.0 if step == 1200 else 9.0, "moe/router_entropy": 1.5}
            line |= {"moe/dead_experts": 0, "moe/dropped_fraction": 0.0}
        lines += [line, {"step": step, "tokens": step * 1024, "eval/loss": loss + 100 / step}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"final_eval_loss": loss, "final_bits_per_byte": loss / 2, "tokens": 1228800}
    (folder / "summary.json").write_text(json.dumps(summary | {"tokens_per_s": tokens_per_s, "cost": COST}))


@pytest.fixture
def sweep(tmp_path):
    for name, (settings, losses) in SHAPES.items():
        for seed, loss in enumerate(losses):
            speed = 1000.0 if name == "dense" else 800.0
            write_run(tmp_path / f"{name}-{seed}", settings, seed, loss, speed)
    return tmp_path


def test_runs_that_differ_in_their_seed_are_a_cell_named_by_what_differs(sweep):
    ((*cells,),) = [found.cells for found in findings_of(sweep)]
    labels = ["dense,width=512", "dense,width=2048", "num_experts=4", "num_experts=8", "num_experts=16"]
    assert [cell.label for cell in cells] == labels
    assert [sorted(cell.runs) for cell in cells] == [[0, 1, 2]] * 5
    assert cells[2].mean("moe/load_imbalance") == 2.0  # the last tenth of twelve lines is one


def test_differences_are_paired_with_the_dense_cell_of_equal_flops(sweep):
    (found,) = findings_of(sweep)
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


def test_a_size_between_two_dense_ones_is_found_by_the_law_through_them(tmp_path):
    dense, large = 1311872 - 1024 * 128, 3671168 - 1024 * 128  # without the input embedding
    halfway = (3.0 * 2.8) ** 0.5  # of the losses, as logarithms
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["dense,large"][0], seed, 2.8)
        write_run(tmp_path / f"c{seed}", SHAPES["8"][0], seed, halfway)
        write_run(tmp_path / f"d{seed}", SHAPES["16"][0], seed, 2.7)
    (found,) = findings_of(tmp_path)
    assert found.worth["num_experts=8"].mean == pytest.approx((dense * large) ** 0.5, rel=1e-6)
    (sentence,) = (one for one in sentences(found) if one.startswith("Worth a dense model"))
    assert "two sizes, so it has no residual" in sentence
    assert re.search(
        r"num_experts=8 2\.\d+M \[2\.\d+M, 2\.\d+M\]; num_experts=16 .*, extrapolated\.", sentence
    )


@pytest.mark.parametrize(("large", "told"), [((2.80, 2.81), True), ((2.70, 2.99), False)])
def test_no_size_is_told_where_the_dense_law_may_be_flat(tmp_path, large, told):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / f"b{seed}", SHAPES["dense,large"][0], seed, large[seed])
        write_run(tmp_path / f"c{seed}", SHAPES["8"][0], seed, 2.9)
    (found,) = findings_of(tmp_path)
    assert list(found.worth) == (["sparse"] if told else [])
    beginnings = [sentence.split()[0] for sentence in sentences(found)]
    assert ("Worth" in beginnings, "What" in beginnings) == (told, not told)


def test_one_seed_tells_no_dense_size(tmp_path):
    for name, loss in (("dense", 3.0), ("dense,large", 2.8), ("8", 2.9)):
        write_run(tmp_path / name, SHAPES[name][0], 0, loss)
    (found,) = findings_of(tmp_path)
    assert found.worth == {}
    (sentence,) = (one for one in sentences(found) if one.startswith("What dense size"))
    assert sentence.endswith("one seed tells no spread.")


def test_the_sentences_tell_better_from_worse_and_from_unclear(sweep):
    for seed, loss in enumerate((3.10, 3.15, 3.05)):
        write_run(sweep / f"bad-{seed}", ["moe.num_experts=32"], seed, loss)
    for seed, loss in enumerate((3.00, 3.20, 2.80)):
        write_run(sweep / f"noisy-{seed}", ["moe.num_experts=2"], seed, loss)
    (found,) = findings_of(sweep)
    said = list(sentences(found))

    def one(beginning):
        (sentence,) = (sentence for sentence in said if sentence.startswith(beginning))
        return sentence

    better = one("Better than dense,width=512")
    assert all(f"num_experts={experts} by" in better for experts in (4, 8, 16))
    assert "num_experts=8 by -0.1000 [-0.1000, -0.1000]" in better
    assert re.search(r"width=2048 by -0\.1967 \[.*\] \(with 2\.89 times its FLOPs\)", better)
    assert "num_experts=32 by +0.1000" in one("Worse than dense,width=512")
    assert "num_experts=2 by +0.0000" in one("Not told apart from dense,width=512")
    steps = one("Step by step along moe.num_experts")
    assert "num_experts=16 not told apart from num_experts=8" in steps
    assert "num_experts=32 worse than num_experts=16" in steps
    assert "num_experts=8 0.80" in one("Tokens per second")
    assert "after 1.23M tokens a run" in one("All this")
    # By hand: the seeds of 2 experts differ from the dense ones by 0, 0.16, -0.16: t times 0.16 / sqrt(3).
    assert f"to {4.302653 * 0.16 / 3**0.5:.4f} nats to either side" in one("The intervals of sparse models")
    # 6 against dense, 1 at equal totals, 4 steps, 3 from the first, 2 exponents, 5 sizes.
    assert "here are 21." in one("Of twenty intervals of 95 %")
    # 16 against 2: -0.09, -0.30, 0.08. 8 experts have 3,675,264 parameters, the wide dense model 3,671,168.
    assert "num_experts=16 not told apart from num_experts=2: -0.1033" in one("And from the first")
    assert "num_experts=8 worse than dense,width=2048: +0.0967" in one("At equal total parameters")
    assert "so no law is supported" in one("Loss as a power of total parameters")


def test_a_planted_power_law_is_found_along_the_experts_of_equal_flops_only(tmp_path):
    for experts in (1, 2, 4, 8, 16, 32):
        settings = ["moe.top_k=1", "moe.d_ff_expert=512"] if experts == 1 else []
        settings = [f"moe.num_experts={experts}", *settings]
        loss = 20 * count(config_of(settings)).total ** -0.13
        write_run(tmp_path / f"{experts}", settings, 0, loss)
    (found,) = findings_of(tmp_path)
    (curve,) = found.curves
    assert (curve.key, len(curve.cells)) == ("moe.num_experts", 5)
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
    (found,) = findings_of(tmp_path)
    assert [curve.law for curve in found.curves if any("top_k=1" in cell.label for cell in curve.cells)] == [
        None
    ]


def test_curves_go_along_one_setting_at_a_time(tmp_path):
    for experts in (4, 8):
        for k in (2, 4):
            settings = [f"moe.num_experts={experts}", f"moe.top_k={k}", f"moe.d_ff_expert={512 // k}"]
            write_run(tmp_path / f"{experts}-{k}", settings, 0, 3.0)
    (found,) = findings_of(tmp_path)
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
    (found,) = findings_of(tmp_path)
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
    (found,) = findings_of(tmp_path)
    finer = [
        (curve.cells[0].config.moe.aux_loss_coef, [cell.config.moe.num_experts for cell in curve.cells])
        for curve in found.curves
        if not curve.key
    ]
    assert sorted(finer) == [(0.0, [8, 16, 32]), (0.02, [8, 16, 32])]


def test_dense_runs_of_another_width_are_another_cell_also_by_shared_experts(tmp_path):
    write_run(tmp_path / "a", [*SHAPES["dense"][0]], 0, 3.0)
    write_run(tmp_path / "b", [*SHAPES["dense"][0], "moe.num_shared_experts=1"], 0, 2.9)
    (found,) = findings_of(tmp_path)
    totals = [cell.ledger.total for cell in found.cells]
    assert totals[1] - totals[0] == 4 * 3 * 128 * 512  # by hand: layers, matrices, their sides


def test_one_seed_no_common_seed_and_no_dense_run_are_said(tmp_path):
    write_run(tmp_path / "a", SHAPES["8"][0], 0, 2.9)
    (found,) = findings_of(tmp_path)
    assert list(sentences(found)) == [
        "sparse is compared with nothing: no other run here has its settings outside moe.*."
    ]
    write_run(tmp_path / "c", SHAPES["16"][0], 7, 2.8)
    (found,) = findings_of(tmp_path)
    assert next(sentences(found)) == "Nothing is compared with a dense model: there is no dense run."
    write_run(tmp_path / "b", SHAPES["dense"][0], 0, 3.0)
    (found,) = findings_of(tmp_path)
    said = list(sentences(found))
    assert said[0] == "One seed in common with dense tells no spread; may be chance: num_experts=8."
    assert said[1] == "No seed in common with dense, so not compared: num_experts=16."
    write_run(tmp_path / "d", SHAPES["16"][0], 0, 2.8)  # one seed in common with 8 experts: no verdict
    (found,) = findings_of(tmp_path)
    assert not [one for one in sentences(found) if one.startswith("Step by step")]


def test_runs_of_other_settings_are_not_compared(sweep):
    write_run(sweep / "other", ["moe.num_experts=8", "optim.lr=1e-3"], 0, 2.5)
    write_run(sweep / "rounded", ["moe.num_experts=8", "parallel.precision=bf16"], 0, 2.5)
    write_run(sweep / "shown_oftener", ["moe.num_experts=2", "train.eval_interval=77"], 0, 2.9)
    sets = findings_of(sweep)
    assert {found.title: len(found.cells) for found in sets} == {
        "optim.lr=0.003, parallel.precision=fp32": 6,
        "optim.lr=0.001, parallel.precision=fp32": 1,
        "optim.lr=0.003, parallel.precision=bf16": 1,
    }
    write_report(sweep)
    assert (sweep / "report.html").read_text().count("<h2>What it shows</h2>") == 3
    assert (sweep / "speed_3.png").exists()


def test_cells_of_a_sweep_keep_its_names_and_a_dense_one_is_marked(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs" / "num_experts=1" / f"seed-{seed}", SHAPES["dense"][0], seed, 3.0)
        write_run(tmp_path / "runs" / "anything" / f"seed-{seed}", SHAPES["8"][0], seed, 2.9)
    (found,) = findings_of(tmp_path)
    assert [cell.label for cell in found.cells] == ["num_experts=1 (dense)", "anything"]


def test_dense_runs_that_differ_in_routing_are_one_cell_and_a_copy_is_left_out(tmp_path):
    write_run(tmp_path / "a", SHAPES["dense"][0], 0, 3.0)
    write_run(tmp_path / "b", [*SHAPES["dense"][0], "moe.aux_loss_coef=0.5"], 1, 3.1)
    write_run(tmp_path / "c", SHAPES["dense"][0], 0, 3.2)
    (found,) = findings_of(tmp_path)
    assert [cell.losses for cell in found.cells] == [{0: 3.0, 1: 3.1}]
    assert write_report(tmp_path)[0] == "Left out, as another run has the same settings and seed: c."


def test_the_table_holds_every_cell_and_what_is_unfinished_or_quick_is_said(sweep):
    record = [
        {"cell": "num_experts=64", "seed": 1, "finished": False, "exit_code": 1},
        {"cell": "num_experts=64", "seed": 2, "finished": False, "exit_code": None},
        {"cell": "x", "seed": 0, "finished": True},
    ]
    (sweep / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    (sweep / "plan.json").write_text('{"quick": true, "cells": {}}')
    said = write_report(sweep)
    assert said[0].startswith("A quick sweep")
    failed, missing = "num_experts=64 seed 1 (exit code 1)", "num_experts=64 seed 2"
    assert said[1] == f"Not finished, and so not counted: {failed}; {missing}."
    page = (sweep / "report.html").read_text()
    assert all(html.escape(one) in page for one in said)
    with (sweep / "results.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5
    eight = rows["num_experts=8"]
    assert (eight["experts"], eight["top_k"], eight["seeds"]) == ("8", "2", "3")
    assert eight["baseline"] == "dense,width=512"
    assert float(eight["loss"]) == pytest.approx(2.90)
    assert (float(eight["usd"]), eight["kwh"]) == (1.5, "")
    assert float(eight["flops"]) == 1228800 * 7_498_752
    assert rows["dense,width=512"]["difference"] == ""
    assert (sweep / "usd.png").exists()
    assert not (sweep / "kwh.png").exists()


def test_what_is_no_run_is_refused(sweep):
    with pytest.raises(ConfigError, match="holds no finished run"):
        read_runs(sweep / "dense-0" / "checkpoints")
    for summary in ("{", "{}", "[]"):
        (sweep / "dense-0" / "summary.json").write_text(summary)
        with pytest.raises(ConfigError, match="but not that of a run"):
            read_runs(sweep)
