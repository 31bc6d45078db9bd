"""scripts/ablate.py before anything is trained: its plans, and what it refuses."""

import sys

import pytest

from moe.ablation import estimate
from moe.ablation.ablation_folder import AblationFolder
from moe.config import load_config
from moe.tables import duration
from scripts.ablate import main
from tests.support.commands import exit_code
from tests.support.paths import CONFIGS, TINY

EIGHT = ["--vary", "moe.num_experts=8"]


@pytest.fixture
def config(small) -> list[str]:
    """A reference whose dense model of equal total parameters is not affordable."""
    shrunk = [item for item in small if not item.startswith(("moe.num_shared_experts", "moe.num_experts"))]
    return [str(TINY), *shrunk, "moe.num_experts=16", "moe.d_ff_expert=512"]


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
        (
            [*EIGHT, "--hold", "seconds", "--no-dense"],
            "--no-dense: with --hold seconds all cells get the time",
        ),
        (
            [*EIGHT, "--hold", "seconds", "--vary", "moe.d_ff_expert=64"],
            "--hold: active_flops is held by the",
        ),
        ([*EIGHT, "--hold", "minutes"], "argument --hold: invalid choice: 'minutes'"),
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
    code = exit_code(main, [*config, *arguments, "--out", str(out)])
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
    total = sum(seconds) * 3 / 2  # three seeds, two jobs; the seconds of the rows are rounded
    start = "the start of a run counted as 9 seconds"
    said = [
        f"12 runs of 1.23M tokens; about {duration(total + off)}, 2 at a time, {start}" for off in (-6, 0, 6)
    ]
    assert lines[-1] in said


def test_the_time_of_a_run_is_that_of_its_start_steps_and_evaluations(monkeypatch, tmp_path, capsys):
    """By hand: with 0.3 s a batch, 10 steps and 4 evaluations of 5 batches without a backward pass: 5 s."""
    monkeypatch.setattr(estimate, "_seconds_per_micro_batch", lambda _: 0.3)
    monkeypatch.setattr(estimate, "UPDATE_SECONDS", 0.0)
    steps = ["train.steps=10", "train.eval_interval=5", "train.eval_batches=5"]
    (tmp_path / "a.txt").write_text("words")
    call = [str(TINY), *EIGHT, *steps, f"data.extra_validation.a={tmp_path / 'a.txt'}", "--no-dense"]
    assert main([*call, "--out", str(tmp_path / "ablation"), "--jobs", "1", "--seeds", "0", "--dry-run"]) == 0
    *_, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[-1] == "14"
    assert "about 14 seconds, 1 at a time" in last


def test_times_are_told_in_the_unit_that_suits_them():
    times = [3.1, 119.4, 120, 7000, 7740]
    assert [*map(duration, times)] == ["3 seconds", "119 seconds", "2 minutes", "117 minutes", "2.1 hours"]


def test_the_reference_of_ablations_warms_up_for_a_twentieth_of_its_steps():
    assert load_config(CONFIGS / "ablation.yaml").warmup_steps == 75
    assert load_config(CONFIGS / "ablation.yaml", ["train.steps=20"]).warmup_steps == 1


def test_dense_models_can_be_left_out(config, tmp_path, capsys):
    call = [*config, "--vary", "moe.num_experts=1,8", "--out", str(tmp_path / "ablation"), "--dry-run"]
    assert main([*call, "--no-dense"]) == 0
    printed = capsys.readouterr().out
    assert "num_experts=1 " in printed  # was asked for
    assert "dense," not in printed
    assert "6 runs of" in printed


def test_a_dry_run_prints_the_plan_and_trains_nothing(config, tmp_path, capsys):
    out = tmp_path / "ablation"
    assert main([*config, "--vary", "granularity=1,2", "--out", str(out), "--dry-run"]) == 0
    assert "granularity=2" in capsys.readouterr().out
    assert not out.exists()
