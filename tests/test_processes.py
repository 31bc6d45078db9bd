"""One run in processes of its own: interrupted, killed, and continued by fewer."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from tests.ranks import run_ranks
from tests.test_train import assert_same_run

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


def finish(arguments):
    assert train.main(arguments) == 0


def test_device_hours_are_those_of_the_ranks_that_each_part_had(small, tmp_path):
    run = tmp_path / "run"
    run_ranks(2, finish, [*small, f"run.dir={run}", "train.steps=8"])
    saved = json.loads((run / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    first_part = saved["info"]["wall_s"]
    finish([*small, f"run.dir={run}", "train.steps=12"])
    summary = json.loads((run / "summary.json").read_text())
    second_part = summary["wall_s"] - first_part
    assert second_part > 0
    assert 3600 * summary["cost"]["device_hours"] == pytest.approx(2 * first_part + second_part)
