"""Runs in processes of their own: interrupted, killed, and on two ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from tests.conftest import read_lines
from tests.test_train import assert_same_run, final_state

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_ctrl_c_on_a_real_process_saves_and_says_how_to_resume(small, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *small,
        f"run.dir={tmp_path / 'run'}",
        "train.steps=100000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped and saved at step" in out
    assert "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint(small, tmp_path):
    overrides = [*small, "train.steps=200", "train.eval_interval=200"]
    command = [sys.executable, str(ROOT / "train.py"), *overrides, f"run.dir={tmp_path / 'killed'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums depend on the threads
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "/200" in line and int(line.split()[1].split("/")[0]) % 100 > 25:
                break
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, env=environment, capture_output=True, timeout=120).returncode == 0
    assert train.main([*overrides, f"run.dir={tmp_path / 'whole'}"]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_with_replicated_experts_are_the_run_of_one_process(small, tmp_path, monkeypatch):
    """Every loss, norm and evaluation; and a checkpoint of one process resumes on two, and of two on one."""
    arguments = [*small, "train.keep_checkpoints=9"]
    assert train.main([*arguments, f"run.dir={tmp_path / 'one'}"]) == 0
    for name, first_ranks, second_ranks in (("one to two", 1, 2), ("two to one", 2, 1)):
        run = tmp_path / name
        shutil.copytree(tmp_path / "one", run) if first_ranks == 1 else on_two_ranks(arguments, run)
        for path in (
            run / "summary.json",
            run / "checkpoints" / "step-00000012",
            run / "checkpoints" / "step-00000008",
        ):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if second_ranks == 2:
            assert "resumed from" in on_two_ranks(arguments, run)
        else:
            assert train.main([*arguments, f"run.dir={run}"]) == 0
        for line, other in zip(read_lines(tmp_path / "one"), read_lines(run), strict=True):
            for key in line.keys() - {"moe/dead_experts"}:
                assert other[key] == pytest.approx(line[key], rel=1e-4), (name, line["step"], key)
        for tensor_name, tensor in final_state(tmp_path / "one").items():
            if tensor_name.startswith("weights"):
                torch.testing.assert_close(
                    final_state(run)[tensor_name], tensor, rtol=1e-3, atol=1e-4, msg=tensor_name
                )


def on_two_ranks(arguments, run):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "train.py"), *arguments, f"run.dir={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
