"""report.html, results.csv and the figures."""

import csv
import html
import json

import pytest
from scipy import stats

from moe.ablation.html_report import write_report
from moe.accounting.counts import count_parameters
from tests.support.finished_runs import SHAPES, comparisons_of, config_of, write_run


def test_runs_of_other_settings_are_not_compared(ablation):
    write_run(ablation / "other", ["moe.num_experts=8", "optim.lr=1e-3"], 0, 2.5)
    write_run(ablation / "rounded", ["moe.num_experts=8", "parallel.precision=bf16"], 0, 2.5)
    write_run(ablation / "shown_oftener", ["moe.num_experts=2", "train.eval_interval=77"], 0, 2.9)
    sets = comparisons_of(ablation)
    assert {found.title: len(found.cells) for found in sets} == {
        "optim.lr=0.003, parallel.precision=fp32": 6,
        "optim.lr=0.001, parallel.precision=fp32": 1,
        "optim.lr=0.003, parallel.precision=bf16": 1,
    }
    write_report(ablation)
    assert (ablation / "report.html").read_text().count("<h2>What it shows</h2>") == 3
    assert (ablation / "figures" / "speed_3.png").exists()


def test_the_table_holds_every_cell_and_what_is_unfinished_or_quick_is_said(ablation):
    record = [
        {"cell": "num_experts=64", "seed": 1, "finished": False, "exit_code": 1},
        {"cell": "num_experts=64", "seed": 2, "finished": False, "exit_code": None},
        {"cell": "x", "seed": 0, "finished": True},
    ]
    (ablation / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    (ablation / "plan.json").write_text('{"quick": true, "cells": {}}')
    said = write_report(ablation)
    assert said[0].startswith("A quick ablation")
    failed, missing = "num_experts=64 seed 1 (exit code 1)", "num_experts=64 seed 2"
    assert said[1] == f"Not finished, so not included: {failed}; {missing}."
    page = (ablation / "report.html").read_text()
    assert all(html.escape(one) in page for one in said)
    with (ablation / "results.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5
    eight = rows["num_experts=8"]
    assert (eight["experts"], eight["top_k"], eight["seeds"]) == ("8", "2", "3")
    assert eight["baseline"] == "dense,width=512"
    assert float(eight["loss"]) == pytest.approx(2.90)
    assert (float(eight["usd"]), eight["kwh"]) == (1.5, "")
    assert float(eight["flops"]) == 1228800 * 7_498_752
    assert rows["dense,width=512"]["difference"] == ""
    assert (ablation / "figures" / "usd.png").exists()
    assert not (ablation / "figures" / "kwh.png").exists()


def test_losses_on_further_texts_are_in_the_first_table(tmp_path):
    """Of two seeds the mean, by hand. Runs without such texts are another set."""
    for seed, loss in enumerate((1.5, 1.75)):
        run = tmp_path / f"a{seed}"
        write_run(run, [*SHAPES["8"][0], "data.extra_validation.news=news.txt"], seed, 2.9)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": 1200, "tokens": 1, "eval/loss": 2.9, "eval/news/loss": {loss}}}\n')
    write_run(tmp_path / "0", SHAPES["8"][0], 0, 2.9)
    said = write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    quality = page.split("<h2>Quality</h2>")[2].split("<details>")[0]
    assert '<td data-title="loss on news">1.6250</td>' in quality
    with (tmp_path / "results.csv").open() as file:
        assert [row["loss/news"] for row in csv.DictReader(file)] == ["", "1.625"]
    assert [line.split(": tiny ends at")[0] for line in said if ": tiny ends at" in line] == [
        "data.extra_validation={}", 'data.extra_validation={"news": "news.txt"}',
    ]  # fmt: skip


def test_two_sets_of_runs_are_compared_by_the_paired_t_test_over_their_seeds(tmp_path):
    """Folders of any names. The losses of both vary with the seed by ten times what tells them apart."""
    sparse, dense = [3.21, 3.65, 2.78, 3.30], [3.26, 3.68, 2.84, 3.33]
    for seed in range(4):
        write_run(tmp_path / f"tiny-{seed}", SHAPES["8"][0], seed, sparse[seed], 800.0 + seed)
        write_run(tmp_path / f"tiny_dense-{seed}", SHAPES["dense"][0], seed, dense[seed])
    said = write_report(tmp_path)
    expected = stats.ttest_rel(sparse, dense).confidence_interval(0.95)
    mean = sum(sparse) / 4 - sum(dense) / 4
    with (tmp_path / "results.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    row = rows["sparse"]
    found = [float(row[key]) for key in ("difference", "difference_low", "difference_high")]
    assert found == pytest.approx([mean, expected.low, expected.high])
    shown = f"{mean:+.4f} [{expected.low:+.4f}, {expected.high:+.4f}]"
    assert said[1].startswith("Better than dense ")
    assert f"sparse {shown}" in said[1]
    assert f">{shown}</td>" in (tmp_path / "report.html").read_text()
    for name, speed in (("8", 801.5), ("dense", 1000.0)):
        counts, row = count_parameters(config_of(SHAPES[name][0])), rows["sparse" if name == "8" else name]
        assert int(row["params_total"]) == counts.total
        assert int(row["params_active"]) == counts.active_all
        assert int(row["flops_per_token"]) == counts.flops_per_token_train
        assert float(row["tokens_per_s"]) == speed


def test_the_sources_of_a_mixture_are_named(tmp_path):
    sources = ["data.sources.a.source=a.txt", "data.sources.b.source=b.txt"]
    weights = ["data.sources.a.weight=1", "data.sources.b.weight=2"]
    for experts in (4, 8):
        settings = [f"moe.num_experts={experts}", *sources, *weights]
        write_run(tmp_path / str(experts), settings, seed=0, loss=3.0)
    write_report(tmp_path)
    assert " tokens each of a.txt, b.txt. Runs of one seed" in (tmp_path / "report.html").read_text()


def test_ordinary_runs_keep_their_names(tmp_path):
    """Those of several seeds what their names have in common."""
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", [*SHAPES["8"][0], f"run.name=sparse_one-{seed}"], seed, 2.9)
        write_run(tmp_path / f"b{seed}", [*SHAPES["dense"][0], f"run.name=old.seed-{seed}"], seed, 3.0)
    write_run(tmp_path / "c", [*SHAPES["16"][0], "run.name=large"], 0, 3.0)
    write_report(tmp_path)
    with (tmp_path / "results.csv").open() as file:
        assert [row["cell"] for row in csv.DictReader(file)] == ["old", "sparse_one", "large"]


def test_the_page_leads_with_one_sentence_and_folds_the_details(ablation):
    said = write_report(ablation)
    page = (ablation / "report.html").read_text()
    assert page.index(f'<p class="headline">{html.escape(said[0])}</p>') < page.index("<img")
    shown, folded = page.split("<details>")
    assert shown.count("<img") == 1
    assert "<h2>Quality</h2>" in shown
    for title in ("What it shows", "Time", "Speed, routing and cost", "More figures"):
        assert f"<h2>{title}</h2>" in folded
    figures = list((ablation / "figures").glob("*.png"))
    assert page.count("<img") == len(figures) > 3
    assert not list(ablation.glob("*.png"))
