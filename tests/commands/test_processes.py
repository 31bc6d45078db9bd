"""One run in processes of its own: interrupted, killed, and continued by fewer."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import train
from moe.config.command_line import command, end_on_ctrl_c
from tests.support.launching import stopped_at_the_end
from tests.support.paths import ROOT, TRAIN
from tests.support.runs import assert_same_run
from tests.support.training import train_on_ranks


def test_no_command_imports_at_its_start_what_takes_long_and_may_not_be_needed():
    """So that `--help` and errors in the command line come within two seconds; torch is most of them."""
    commands = [str(TRAIN), *map(str, sorted((ROOT / "scripts").glob("*.py")))]
    script = f"""
import runpy, sys
for command in {commands}:
    runpy.run_path(command)
    slow = {{"deepspeed", "matplotlib", "scipy", "huggingface_hub", "datasets", "transformers"}}
    slow |= {{"torch._dynamo"}}
    assert not slow & set(sys.modules), (command, slow & set(sys.modules))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, cwd=ROOT)


def test_a_command_that_has_begun_is_interrupted_by_an_exception():
    """So that it can remove and release what it holds; before that, Ctrl-C ends the process at once."""
    handlers = []
    begin = command(lambda _: handlers.append(signal.getsignal(signal.SIGINT)) or 0)
    with patched_signal(signal.SIGINT, signal.default_int_handler):
        end_on_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert begin([]) == 0
    with patched_signal(signal.SIGINT, signal.SIG_IGN):  # as a job in the background has it
        end_on_ctrl_c()
        assert begin([]) == 0
    assert handlers == [signal.default_int_handler, signal.SIG_IGN]


@contextmanager
def patched_signal(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    yield
    signal.signal(number, before)


@pytest.mark.slow
def test_ctrl_c_on_a_real_process_saves_and_says_how_to_resume(small, tmp_path):
    command = [sys.executable, str(TRAIN), *small, f"run.dir={tmp_path / 'run'}", "train.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with stopped_at_the_end(process):
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
def test_a_killed_run_resumes_from_its_last_checkpoint(small, short_samples, tmp_path, capsys):
    """Two processes are killed, the second after it resumed; this process goes on."""
    overrides = [*small, "train.steps=80", "train.eval_interval=40", "train.checkpoint_interval=10"]
    call = [*overrides, f"run.dir={tmp_path / 'killed'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums depend on the threads
    for kill_at in (22, 44):
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), *call], env=environment, stdout=subprocess.PIPE, text=True
        )
        with stopped_at_the_end(process):
            assert process.stdout is not None
            for line in process.stdout:
                if "/80: loss" in line and int(line.split()[1].split("/")[0]) >= kill_at:
                    break
        assert process.returncode == -signal.SIGKILL
    assert train.main(call) == 0
    assert "resumed from" in capsys.readouterr().out
    assert train.main([*overrides, f"run.dir={tmp_path / 'whole'}"]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_device_hours_are_those_of_the_ranks_that_each_part_had(small, short_samples, tmp_path):
    run = tmp_path / "run"
    train_on_ranks(2, [*small, f"run.dir={run}", "train.steps=8"])
    saved = json.loads((run / "checkpoints" / "step-00000008" / "manifest.json").read_text())
    first_part = saved["info"]["wall_s"]
    assert train.main([*small, f"run.dir={run}", "train.steps=12"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    second_part = summary["wall_s"] - first_part
    assert second_part > 0
    assert 3600 * summary["cost"]["device_hours"] == pytest.approx(2 * first_part + second_part)


@pytest.mark.parametrize("name", ["train.py", "scripts/ablate.py", "scripts/bench.py", "scripts/doctor.py"])
def test_ctrl_c_while_torch_is_imported_is_one_line(name, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    call = [sys.executable, str(ROOT / name)]
    with subprocess.Popen(call, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "importing\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "interrupted\n")
        assert process.returncode == 130
