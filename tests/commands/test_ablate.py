"""scripts/ablate.py: trained side by side, stopped, continued, reported."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import train
from moe.ablation import runner
from scripts.ablate import main
from scripts.report import main as report
from tests.support.paths import CONFIGS, ROOT, TINY
from tests.support.runs import read_lines
from tests.support.training import ForkedTraining

pytestmark = pytest.mark.xdist_group("ablate")  # one ablation is made once


@pytest.fixture(scope="module")
def config(tmp_path_factory, small) -> list[str]:
    """A reference, and overrides that make a run take seconds."""
    shrunk = [item for item in small if not item.startswith(("moe.num_shared_experts", "moe.num_experts"))]
    return [
        str(TINY),
        *shrunk,
        "moe.num_experts=16",  # a dense model of equal total is not affordable: fewer runs
        "moe.d_ff_expert=512",
        "train.steps=12",
    ]


def run_forked(arguments: list[str]) -> int:
    """The command, whose runs are forked from a process that has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.subprocess, "Popen", ForkedTraining)
        return main(arguments)


@pytest.fixture(scope="module")
def ablation(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "experts"
    arguments = ["--vary", "moe.num_experts=1,16", "--seeds", "0,1", "--out", str(out)]
    assert run_forked([*config, *arguments]) == 0
    return out


@pytest.mark.slow
def test_every_cell_and_seed_is_an_ordinary_finished_run(ablation):
    lines = [json.loads(line) for line in (ablation / "results.jsonl").read_text().splitlines()]
    cells = {"num_experts=1", "num_experts=16", "dense,double_active"}
    assert {(line["cell"], line["seed"]) for line in lines} == {
        (cell, seed) for cell in cells for seed in (0, 1)
    }
    assert all(line["finished"] for line in lines)
    for line in lines:
        run = ablation / "runs" / line["cell"] / f"seed-{line['seed']}"
        assert {"config.yaml", "metrics.jsonl", "summary.json", "loss.png"} <= {
            path.name for path in run.iterdir()
        }
        assert line["final_eval_loss"] == json.loads((run / "summary.json").read_text())["final_eval_loss"]


@pytest.mark.slow
def test_one_expert_is_bit_for_bit_the_dense_model_trained_alone(ablation, config, short_samples, tmp_path):
    alone = tmp_path / "alone"
    width = json.loads((ablation / "plan.json").read_text())["cells"]["num_experts=1"]["config"]["moe"][
        "d_ff_expert"
    ]
    dense = [str(CONFIGS / "tiny_dense.yaml"), *config[1:], "moe.num_experts=1", "moe.top_k=1"]
    assert train.main([*dense, f"moe.d_ff_expert={width}", f"run.dir={alone}", "run.seed=1"]) == 0
    assert read_lines(alone) == read_lines(ablation / "runs" / "num_experts=1" / "seed-1")


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_another_plan_is_refused(ablation, config, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in (ablation / "runs").rglob("summary.json")}
    arguments = ["--seeds", "0,1", "--out", str(ablation)]
    assert main([*config, "--vary", "moe.num_experts=1,16", *arguments]) == 0
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    record = (ablation / "results.jsonl").read_bytes()
    assert (
        main(
            [*config, "--vary", "moe.num_experts=1", "--seeds", "0", "--out", str(ablation), "log.interval=3"]
        )
        == 0
    )
    assert (ablation / "results.jsonl").read_bytes() == record  # other cells and seeds are not forgotten
    assert main([*config, "--vary", "moe.num_experts=16", "optim.lr=1e-3", *arguments]) == 2
    assert (
        "num_experts=16 has optim.lr 0.003 there, not 0.001; choose another folder" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_report_is_one_file_without_requests_and_its_table_holds_every_cell(ablation):
    page = (ablation / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert page.count("<figure>") == 9
    with (ablation / "results.csv").open() as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    assert len(rows) == 3  # one dense one more
    assert rows["num_experts=16"]["difference"]
    assert float(rows["num_experts=16"]["difference_low"]) < float(rows["num_experts=16"]["difference_high"])


@pytest.mark.slow
def test_the_report_is_rebuilt_from_any_folder_of_runs(ablation, tmp_path, capsys):
    before = (ablation / "results.csv").read_bytes()
    (ablation / "results.csv").unlink()
    assert report([str(ablation)]) == 0
    assert (ablation / "results.csv").read_bytes() == before
    assert report([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_run_is_reported_and_the_others_go_on_also_under_a_launcher(config, tmp_path, capsys):
    out = tmp_path / "by_launcher"
    blocked = out / "runs" / "num_experts=4" / "seed-0"
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").mkdir()  # no run can write there
    launcher = f"{Path(sys.executable).with_name('torchrun')} --standalone --nproc-per-node 2"
    call = [*config, "log.wandb=offline", "--vary", "moe.num_experts=4", "--seeds", "0", "--out", str(out)]
    assert main([*call, "--launcher", launcher]) == 1
    printed = capsys.readouterr().out
    assert "num_experts=4,seed=0: FAILED with exit code" in printed
    assert "Not finished, so not included: num_experts=4 seed 0 (exit code " in printed
    finished = {
        json.loads(line)["cell"]: json.loads(line)["finished"] for line in (out / "results.jsonl").open()
    }
    assert finished == {"num_experts=4": False, "dense,equal_active": True, "dense,double_active": True}
    for cell in ("dense,equal_active", "dense,double_active"):
        run = out / "runs" / cell / "seed-0"
        assert json.loads((run / "env.json").read_text())["ranks"] == 2
        (mirror,) = run.glob("wandb/offline-run-*/*.wandb")
        assert b"by_launcher" in mirror.read_bytes()  # the group


@pytest.fixture
def killed(tmp_path) -> Iterator[Path]:
    """Folder of an ablation whose processes are killed, all of them at the end."""
    out = tmp_path / "killed"
    yield out
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(out) in argument for argument in process.cmdline()):
                process.kill()


@pytest.mark.slow
def test_an_ablation_that_is_stopped_or_killed_and_started_again_gives_the_same_results(
    ablation, config, killed
):
    out, moments = killed, random.Random()
    call = [sys.executable, str(ROOT / "scripts" / "ablate.py"), *config, "--vary", "moe.num_experts=1,16"]
    call += ["--seeds", "0", "--jobs", "1", "--out", str(out)]  # one by one: work is left at every kill

    def saved():
        return set(out.glob("runs/*/*/checkpoints/step-*"))

    def begin(latest):
        """Start in the background of a shell without job control, and come back at a moment after a save."""
        before = saved()
        process = subprocess.Popen(
            call,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        while saved() <= before and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moment := moments.uniform(0, latest))
        print(f"{moment:.2f} s after a save")
        return process

    process = begin(2)
    process.terminate()
    assert process.communicate(timeout=60)[0].endswith(b"stopped; run the same command again to continue\n")
    assert process.returncode == 130
    lines = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert len(lines) == 3
    assert not all(line["finished"] for line in lines)
    process = begin(2)
    process.kill()  # its runs go on
    process.communicate()
    process = begin(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert run_forked(call[2:]) == 0
    runs = sorted((ablation / "runs").glob("*/seed-0"))
    assert len(runs) == 3
    for run in runs:
        assert read_lines(run) == read_lines(out / "runs" / run.relative_to(ablation / "runs"))
