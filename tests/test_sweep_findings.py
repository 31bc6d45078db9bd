import csv
import html
import json
import re
from pathlib import Path

import pytest

from moe.config import ConfigError
from moe.config_io import dump_config, load_config
from moe.sweep.findings import analyse, read_cells
from moe.sweep.page import write_report
from moe.sweep.sentences import sentences

TINY = Path(__file__).parent.parent / "configs" / "tiny.yaml"
SHAPES = {  # losses of seeds 0, 1, 2
    "dense": (["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=512"], (3.00, 3.04, 2.96)),
    "dense,large": (["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=2048"], (2.80, 2.85, 2.76)),
    "4": (["moe.num_experts=4"], (2.95, 3.00, 2.90)),
    "8": (["moe.num_experts=8"], (2.90, 2.94, 2.86)),
    "16": (["moe.num_experts=16"], (2.91, 2.90, 2.88)),
}
COST = {"device_hours": 0.5, "usd": 1.5, "kwh": None, "tco2e": None}


def write_run(folder, settings, seed, loss, tokens_per_s=1000.0):
    """The files of a finished run, in the format of README.md."""
    folder.mkdir(parents=True)
    config = load_config(TINY, ["model.vocab_size=1024", *settings, f"run.seed={seed}", f"run.dir={folder}"])
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
    cells = read_cells(sweep)
    labels = ["dense,width=512", "dense,width=2048", "num_experts=4", "num_experts=8", "num_experts=16"]
    assert [cell.label for cell in cells] == labels
    assert [sorted(cell.runs) for cell in cells] == [[0, 1, 2]] * 5
    assert cells[2].mean("moe/load_imbalance") == 2.0  # the last tenth of twelve lines is one


def test_differences_are_paired_with_the_dense_cell_of_equal_flops(sweep):
    (found,) = analyse(read_cells(sweep))
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
    (found,) = analyse(read_cells(tmp_path))
    assert found.worth["num_experts=8"].mean == pytest.approx((dense * large) ** 0.5, rel=1e-6)
    (sentence,) = (one for one in sentences(found) if one.startswith("Worth a dense model"))
    assert "two sizes, so it has no residual" in sentence
    assert re.search(
        r"num_experts=8 2\.\d+M \[2\.\d+M, 2\.\d+M\]; num_experts=16 .*, extrapolated\.", sentence
    )


def test_the_sentences_tell_better_from_worse_and_from_unclear(sweep):
    for seed, loss in enumerate((3.10, 3.15, 3.05)):
        write_run(sweep / f"bad-{seed}", ["moe.num_experts=32"], seed, loss)
    for seed, loss in enumerate((3.00, 3.20, 2.80)):
        write_run(sweep / f"noisy-{seed}", ["moe.num_experts=2"], seed, loss)
    (found,) = analyse(read_cells(sweep))
    said = list(sentences(found))

    def one(beginning):
        (sentence,) = (sentence for sentence in said if sentence.startswith(beginning))
        return sentence

    better = one("Better than dense,width=512")
    assert all(f"num_experts={experts} by" in better for experts in (4, 8, 16))
    assert "num_experts=8 by -0.1000 [-0.1000, -0.1000]" in better
    assert "num_experts=32 by +0.1000" in one("Worse than dense,width=512")
    assert "num_experts=2 by +0.0000" in one("Not told apart from dense,width=512")
    assert "num_experts=16 not told apart from num_experts=8" in one("Step by step")
    assert "num_experts=32 worse than num_experts=16" in one("Step by step")
    assert "num_experts=8 0.80" in one("Tokens per second")
    assert "after 1.23M tokens a run" in one("All this")


def test_one_seed_and_no_dense_run_are_said(tmp_path):
    write_run(tmp_path / "a", SHAPES["8"][0], 0, 2.9)
    (found,) = analyse(read_cells(tmp_path))
    assert list(sentences(found)) == [
        "sparse is compared with nothing: no other run here has its settings outside moe.*."
    ]
    write_run(tmp_path / "c", SHAPES["16"][0], 0, 2.8)
    (found,) = analyse(read_cells(tmp_path))
    beginning = (
        "Nothing is compared with a dense model: there is no dense run beside num_experts=8; num_experts=16"
    )
    assert next(sentences(found)).startswith(beginning)
    write_run(tmp_path / "b", SHAPES["dense"][0], 0, 3.0)
    (found,) = analyse(read_cells(tmp_path))
    assert next(sentences(found)).startswith("One seed in common with dense tells no spread")


def test_runs_of_other_settings_are_not_compared(sweep):
    write_run(sweep / "other", ["moe.num_experts=8", "optim.lr=1e-3"], 0, 2.5)
    first, second = analyse(read_cells(sweep))
    assert second.baseline is None or first.baseline is None
    assert [len(found.cells) for found in (first, second)] == [5, 1]
    assert "lr=0.001" in second.cells[0].label
    write_report(sweep)
    page = (sweep / "report.html").read_text()
    assert page.count("<h2>What it shows</h2>") == 2
    assert (sweep / "speed_1.png").exists()
    assert (sweep / "speed_2.png").exists()


def test_the_table_holds_every_cell_and_what_is_unfinished_is_said(sweep):
    record = [
        {"cell": "num_experts=64", "seed": 1, "finished": False},
        {"cell": "x", "seed": 0, "finished": True},
    ]
    (sweep / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in record))
    said = write_report(sweep)
    assert said[-1] == "Not finished, and so not counted: num_experts=64 seed 1."
    assert html.escape(said[0]) in (sweep / "report.html").read_text()
    with (sweep / "results.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert len(rows) == 5
    eight = rows["num_experts=8"]
    assert (eight["experts"], eight["top_k"], eight["seeds"]) == ("8", "2", "3")
    assert float(eight["loss"]) == pytest.approx(2.90)
    assert (float(eight["usd"]), eight["kwh"]) == (4.5, "")
    assert float(eight["flops"]) == 3 * 1228800 * 7_498_752
    assert rows["dense,width=512"]["difference"] == ""


def test_runs_that_cannot_be_told_apart_are_refused(sweep):
    write_run(sweep / "again", SHAPES["8"][0], 2, 2.9)
    with pytest.raises(ConfigError, match=r"two runs of num_experts=8 with the same seed"):
        read_cells(sweep)
    with pytest.raises(ConfigError, match="holds no finished run"):
        read_cells(sweep / "dense-0" / "checkpoints")
    (sweep / "again" / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_cells(sweep)
