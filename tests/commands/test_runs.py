"""scripts/runs.py: a table of runs, and their curves."""

import errno
import io
import os
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image

import train
from moe.runs.run_folder import RunFolder
from scripts.runs import main
from tests.support.commands import assert_refused
from tests.support.paths import ROOT
from tests.support.runs import read_lines


@pytest.fixture
def rows(capsys):
    """Call the command; the lines of its table, without the heading."""

    def call(*arguments: object) -> list[str]:
        assert main([*map(str, arguments)]) == 0
        heading, *lines = capsys.readouterr().out.splitlines()
        assert heading.split()[:3] == ["run", "status", "experts"]
        return lines

    return call


def test_each_run_has_its_state_size_loss_and_speed(run_main, rows, tmp_path):
    _, run, _, _ = run_main("optim.lr=1e-4", folder="runs/a")
    diverging = ["optim.lr=1e30", "optim.grad_clip=1e30", "optim.max_skips=0"]
    code, _, _, error = run_main(*diverging, folder="runs/deep/b")
    assert code == 1
    _, last = [line for line in read_lines(run) if "eval/loss" in line]
    finished, failed = rows(tmp_path / "runs")
    words = finished.split()
    assert words[:4] == ["a", "finished", "4,", "top-2"]
    assert f"{last['eval/loss']:.4f}" in words
    assert "1.54k" in words  # 12 steps of 4 samples of 32 tokens
    assert failed.split()[:2] == ["deep/b", "failed,"]
    reason = (tmp_path / "runs/deep/b/failure.txt").read_text()
    assert error == f"error: {reason}"


def test_a_run_is_in_training_while_its_process_lives_and_can_be_continued_after_that(run_main, rows):
    _, run, _, _ = run_main()
    (run / "summary.json").unlink()
    assert rows(run)[0].split()[1:6] == ["stopped,", "step", "12", "of", "12"]
    with RunFolder(run).in_use():
        assert rows(run)[0].split()[1] == "training,"
        code, _, out, error = run_main("train.steps=14")
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert error.startswith(f"error: run.name: {run} is being trained by another process; ")
        assert main([str(run.parent)]) == 0  # and looking does not disturb
    code, _, _, _ = run_main("train.steps=14")
    assert code == 0
    assert rows(run)[0].split()[1] == "finished"


def test_a_stopped_run_stands_at_its_newest_checkpoint(run_main, rows):
    """Its log may end before that, or after it."""
    _, run, _, _ = run_main("log.interval=100")
    (run / "summary.json").unlink()
    assert read_lines(run)[-2]["step"] == 12
    for steps in (8, 0):  # two are kept
        shutil.rmtree(max(run.glob("checkpoints/step-*")))
        assert rows(run)[0].split()[1:6] == ["stopped,", "step", str(steps), "of", "12"]


def test_a_failed_run_that_goes_on_is_no_longer_failed(run_main, rows):
    code, run, _, _ = run_main("optim.lr=1e30", "optim.grad_clip=1e30", "optim.max_skips=0")
    assert code == 1
    assert rows(run)[0].split()[1] == "failed,"
    assert run_main("optim.lr=1e-3")[0] == 0
    assert rows(run)[0].split()[1] == "finished"


def test_runs_are_sorted_and_drawn(run_main, rows, tmp_path):
    run_main("optim.lr=1e-2", "moe.num_experts=8", folder="runs/a")
    run_main("optim.lr=1e-6", "train.steps=6", folder="runs/b")
    names = {
        sort: [row.split()[0] for row in rows(tmp_path / "runs", "--sort", sort)]
        for sort in ("name", "loss", "parameters", "tokens", "written")
    }
    assert names["name"] == names["loss"] == names["written"] == ["a", "b"]
    assert names["parameters"] == names["tokens"] == ["b", "a"]
    rows(tmp_path / "runs", "--plot", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # matplotlib's first two


def test_the_table_is_printed_again_until_it_is_stopped(run_main):
    _, run, _, _ = run_main()
    command = [sys.executable, str(ROOT / "scripts" / "runs.py"), str(run), "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(6)]
        watching.send_signal(2)
        assert watching.wait(20) == 130
        assert watching.stderr is not None
        assert watching.stderr.read() == "interrupted\n"
    assert lines[0] == lines[2] == lines[4]
    assert "finished" in lines[1]
    assert time.strftime("%Y-") in lines[5]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "error: FOLDER: nowhere is no folder"),
        (["moe"], "error: FOLDER: moe holds no run; "),
        ([".", "--sort", "x"], "error: argument --sort: invalid choice: 'x'"),
        ([".", "--watch", "0"], "error: argument --watch: should be a number above 0"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line(arguments, expected, capsys):
    assert_refused(main, arguments, expected, capsys)


def test_a_picture_that_cannot_be_written_is_refused_in_one_line(run_main, capsys, tmp_path):
    _, run, _, _ = run_main()
    for name, reason in {
        "nowhere/a.png": "No such file or directory)\n",
        "a.nothing": "Format 'nothing' is not supported (supported formats: ",
    }.items():
        assert main([str(run), "--plot", str(tmp_path / name)]) == 2
        problem = f"error: --plot: cannot write {tmp_path / name} ({reason}"
        assert capsys.readouterr().err.startswith(problem)


@pytest.mark.parametrize("second", [[], ["run.seed=5"]], ids=["same", "different"])
def test_a_process_that_gets_the_lock_late_looks_at_the_folder_again(run_main, monkeypatch, second):
    """Both find the folder empty; the later one gets the lock when the other is done."""
    prepare, runs = train.prepare, []

    def prepared_before_another_run(config):
        monkeypatch.setattr(train, "prepare", prepare)
        run = prepare(config)
        runs.append(run_main())
        return run

    monkeypatch.setattr(train, "prepare", prepared_before_another_run)
    code, run, out, error = run_main(*second)
    assert runs[0][0] == 0
    if second:
        assert code == 2
        assert error.startswith("error: run.seed: differs from the run in ")
    else:
        assert (code, out) == (0, f"{run} is finished; raise train.steps or set another run.name\n")


def test_a_reader_of_the_log_that_goes_away_ends_a_run_and_does_not_fail_it(run_main, rows, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            if text.startswith("step 2/"):
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")
            return super().write(text)

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        code, run, _, error = run_main("train.checkpoint_interval=1")
    assert (code, error) == (141, "")
    assert rows(run)[0].split()[1] == "stopped,"
