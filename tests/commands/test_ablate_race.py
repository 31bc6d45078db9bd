"""scripts/ablate.py --hold seconds: measured, planned, trained for equal time, continued, reported."""

import json
import subprocess
from pathlib import Path

import pytest

from moe.ablation import runner, step_times
from scripts import ablate
from scripts.ablate import main
from tests.support.paths import TINY
from tests.support.training import ForkedTraining

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ablate_race")]

START = subprocess.Popen


def start(command, **options):
    """Runs are forked from a process that has imported torch; what measures them starts as it always does."""
    return (START if "-m" in command else ForkedTraining)(command, **options)


@pytest.fixture(scope="module")
def call(tmp_path_factory, small) -> list[str]:
    """A race of two cells and the dense model of twice the FLOPs, without its folder."""
    shrunk = [item for item in small if not item.startswith(("moe.num_shared_experts", "moe.num_experts"))]
    settings = ["moe.num_experts=16", "moe.d_ff_expert=512", "train.steps=30", "train.eval_interval=10"]
    race = ["--vary", "moe.num_experts=1,16", "--hold", "seconds", "--seeds", "0,1", "--jobs", "2"]
    return [str(TINY), *shrunk, *settings, *race]


def run(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.subprocess, "Popen", start)
        patch.setattr(ablate, "ROUNDS", 3)
        return main(arguments)


@pytest.fixture(scope="module")
def race(call, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("race") / "experts"
    assert run([*call, "--out", str(out)]) == 0
    return out


def test_every_run_has_the_steps_that_its_measured_step_time_allows(race):
    plan = json.loads((race / "plan.json").read_text())
    cells = plan["cells"]
    assert set(cells) == {"num_experts=1", "num_experts=16", "dense,double_active"}
    assert plan["race"] == {"--jobs": 2, "--launcher": "", "parallel.device": "cpu"}
    dense_s = cells["num_experts=1"]["step_time"]["seconds"]
    for name, cell in cells.items():
        assert cell["step_time"]["steps"] == 2 * 3 * step_times.STEPS
        assert cell["config"]["train"]["steps"] == round(30 * dense_s / cell["step_time"]["seconds"])
        for seed in (0, 1):
            lines = (race / "runs" / name / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines]
            assert steps[-1]["step"] == cell["config"]["train"]["steps"]
            last = [line for line in steps if "optim/lr" in line][-1]
            assert last["optim/lr"] == pytest.approx(0.1 * cell["config"]["optim"]["lr"])  # of the schedule
            assert 2 <= sum("eval/loss" in line for line in steps) <= 3
    assert cells["num_experts=1"]["config"]["train"]["steps"] == 30
    page = (race / "report.html").read_text()
    assert "num_experts=1 (dense) in equal time (difference in nats per token" in page
    assert "Equal time: each cell was planned for" in page


def test_the_same_command_again_measures_nothing_and_trains_nothing(race, call, capsys, monkeypatch):
    monkeypatch.setattr(ablate, "measure_step_times", lambda *_, **__: pytest.fail("measured again"))
    plan = (race / "plan.json").read_bytes()
    assert main([*call, "--out", str(race), "--dry-run"]) == 0
    assert main([*call, "--out", str(race)]) == 0
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    assert (race / "plan.json").read_bytes() == plan


def test_another_number_of_jobs_or_equal_steps_are_refused_in_the_same_folder(race, call, capsys):
    plan = (race / "plan.json").read_bytes()
    refused = [
        ([*call, "--jobs", "1"], "--jobs: 1, but step times in"),
        ([*call, "--hold", "active_flops"], f"--hold: {race} was planned as a race by the clock; choose"),
        ([*call, "train.steps=40"], f"--out: {race}: num_experts=1 has train.steps 30 there, not 40; choose"),
    ]
    for arguments, complaint in refused:
        assert main([*arguments, "--out", str(race)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {complaint}")
        assert len(error.splitlines()) == 1
    assert (race / "plan.json").read_bytes() == plan


def test_a_dry_run_measures_and_writes_nothing(call, tmp_path, capsys):
    out = tmp_path / "race"
    assert run([*call, "--no-dense", "--out", str(out), "--dry-run"]) == 0  # but for the one expert of --vary
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "measuring the step times of 2 cells, 2 side by side ..."
    (header,) = (number for number, line in enumerate(lines) if line.startswith("step times"))
    shown = {line.split()[0]: line.split() for line in lines[header + 1 : header + 3]}
    assert shown["num_experts=1"][5:8] == ["24", "1.000", "2"]
    assert shown["num_experts=1"][8] == "30"
    dense_ms, sparse_ms = (float(shown[f"num_experts={number}"][1]) for number in (1, 16))
    assert float(shown["num_experts=16"][6]) == pytest.approx(sparse_ms / dense_ms, rel=0.02)
    assert not out.exists()


def test_a_text_that_is_missing_is_refused_by_the_measurement_in_one_line(call, tmp_path, capsys):
    out = tmp_path / "race"
    assert run([*call, "data.source=/no/such/file.txt", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data.source: ")
    assert len(error.splitlines()) == 1
    assert not out.exists()
