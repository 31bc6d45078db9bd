"""scripts/ablate.py: planned, trained side by side, stopped, continued, reported."""

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
from moe.ablation.ablation_folder import AblationFolder
from scripts.ablate import main
from scripts.report import main as report
from tests.support.paths import CONFIGS, ROOT, TINY
from tests.support.runs import read_lines
from tests.support.training import ForkedTraining

pytestmark = pytest.mark.xdist_group("ablate")  # one ablation is made once


EIGHT = ["--vary", "moe.num_experts=8"]


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


def test_quick_is_a_tenth_of_the_steps(config, tmp_path, capsys):
    call = [
        *config,
        "train.steps=160",
        "optim.warmup_steps=20",
        "--vary",
        "moe.num_experts=8",
        "--seeds",
        "0",
    ]
    assert main([*call, "--out", str(tmp_path / "ablation"), "--quick", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"3 runs of {16 * 4 * 32 / 1e3:.3g}k tokens" in printed
    assert "quick: 1/10 of the steps" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--vary", "moe.num_experts"], "--vary: 'moe.num_experts' is not key=value,value"),
        (["--vary", "moe.num_experts=1,,8"], "--vary: 'moe.num_experts=1,,8' is not key=value,value"),
        (["--vary", "=8"], "--vary: '=8' is not key=value,value"),
        (["--vary", "moe.num_experts=8,8"], "--vary: 'moe.num_experts=8,8' has a value twice"),
        ([*EIGHT, "--vary", "moe.num_experts=4"], "--vary: moe.num_experts is given twice"),
        (["--vary", "moe.num_experts=[1"], "moe.num_experts: should be a valid integer"),
        (["--vary", "moe.num_experts=1.0"], "moe.num_experts: should be a valid integer"),
        (["--vary", "moe.colour=8"], "--vary: 'moe.colour' is not granularity or a key of moe"),
        (["--vary", "granularity=fine"], "granularity: should be a whole number above 0, got fine"),
        ([*EIGHT, "--seeds", "0,0"], "--seeds: should be different whole numbers"),
        ([*EIGHT, "--seeds", "0,00"], "--seeds: should be different whole numbers"),
        ([*EIGHT, "--seeds", "9" * 20], "--seeds: should be different whole numbers"),
        ([*EIGHT, "moe.num_experts=1", "moe.top_k=1"], "moe.num_experts: the reference"),
        ([*EIGHT, "run.seed=5"], "run.*: is set for each run of the ablation"),
        ([*EIGHT, "--jobs", "0"], "argument --jobs: should be a whole number above 0"),
        ([*EIGHT, "--launcher", " "], "--launcher: there is no such command: ' '"),
        ([*EIGHT, "--launcher", "torchrun 'x"], "--launcher: cannot be read (No closing quotation)"),
        ([*EIGHT, "--launcher", "no-such-launcher -n 2"], "--launcher: there is no such command"),
        ([*EIGHT, "--launcher", "deepspeed --num_gpus 2"], "--launcher: deepspeed leaves its ranks behind"),
        ([*EIGHT, "--launcher", sys.executable, "--jobs", "2"], "--jobs: runs with --launcher go one after"),
    ],
)
def test_bad_input_gets_one_line_exit_2_and_writes_nothing(config, tmp_path, capsys, arguments, complaint):
    out = tmp_path / "ablation"
    try:
        code = main([*config, *arguments, "--out", str(out)])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith(f"error: {complaint}")
    assert len(printed.err.splitlines()) == 1
    assert not out.exists()


def test_a_folder_that_is_a_file_is_refused(config, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "ablation"):
        assert main([*config, *EIGHT, "--out", str(out), "--dry-run"]) == 2
        assert capsys.readouterr().err == f"error: --out: {tmp_path / 'file'} is a file; choose a folder\n"


def test_an_ablation_beside_another_in_the_same_folder_is_refused_and_changes_nothing(
    config, tmp_path, capsys
):
    folder = AblationFolder(tmp_path / "ablation")
    with folder.locked():
        assert main([*config, *EIGHT, "--out", str(folder.path)]) == 2
        assert list(folder.path.iterdir()) == []
    error = capsys.readouterr().err
    assert error == f"error: --out: another ablation is running in {folder.path}; wait for it\n"


def test_a_plan_has_a_row_per_cell(tmp_path, capsys):
    call = [str(TINY), *EIGHT, "--jobs", "2", "--out", str(tmp_path / "ablation")]
    assert main([*call, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line.split() for line in lines if line.startswith("num_experts=8"))
    # By hand. Embedding and head 1,024 x 128 each; attention 4 x 128 x 128 a layer, its norms 2 x 128, router
    # 8 x 128, expert 3 x 128 x 256; last norm 128. FLOPs: 6 per weight of a matrix that takes part, and 3 x 4
    # x 128 x 64.5 a layer for attention to 1 to 128 positions. 1,200 steps of 8 samples of 128 tokens.
    rest = 2 * 1024 * 128 + 4 * (4 * 128 * 128 + 2 * 128 + 8 * 128) + 128
    total, active = (rest + 4 * experts * 3 * 128 * 256 for experts in (8, 2))
    flops = int(3 * (2 * (active - 1024 * 128 - 9 * 128) + 4 * 4 * 128 * 64.5))
    assert row[1:8] == ["8", "2", "256", f"{total:,}", f"{active:,}", f"{flops:,}", "+0.00%"]
    assert row[9:11] == ["GiB", f"{1200 * 8 * 128 * flops:.2e}"]
    seconds = [float(line.split()[-1].replace(",", "")) for line in lines[2:-1]]
    assert lines[-1].startswith("12 runs of 1.23M tokens; about ")
    minutes = float(lines[-1].split("about ")[1].split()[0].replace(",", ""))
    assert minutes == pytest.approx(sum(seconds) * 3 / 2 / 60, rel=0.02)  # three seeds, two jobs


def test_a_dry_run_prints_the_plan_and_trains_nothing(config, tmp_path, capsys):
    out = tmp_path / "ablation"
    assert main([*config, "--vary", "granularity=1,2", "--out", str(out), "--dry-run"]) == 0
    assert "granularity=2" in capsys.readouterr().out
    assert not out.exists()
