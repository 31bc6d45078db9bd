"""The doctor passes a sound trainer and fails a broken one."""

import os
import re
import subprocess
import sys

import pytest

from moe.distributed import collectives
from moe.doctor import examination
from scripts.doctor import main
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.training import train_each


@pytest.fixture
def config(tmp_path):
    """A file without sections' keys; the test's own overrides make the model."""
    path = tmp_path / "config.yaml"
    path.write_text("run: {name: doctor}\n")
    return path


@pytest.mark.slow
def test_the_doctor_passes_and_prints_a_line_per_check(small, config):
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "doctor.py"),
            str(config),
            *small,
            "--ranks",
            "1,2",
            "--steps",
            "4",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    for line in (
        r"pass  dropless layer = naive loop, every gradient \(relative\) +\d",
        r"pass  ranks 2, ep 2, ZeRO 1, micro batch 4 +loss \d\.\de[+-]\d\d  norm \d",
        r"pass  saved at ranks 2, ep 2; resumed at ranks 2, ep 2 +(\w+ 0\.0e\+00 *){3}$",
        r"pass  saved at ranks 1, ep 1; resumed at ranks 2, ep 2 ",
        r"pass  no dead expert on \d+ samples +0 dead",
        r"pass  ranks 2: memory fits the estimate",
        r"all passed$",
    ):
        assert re.search(line, done.stdout, re.MULTILINE), (line, done.stdout)


def train_with_smaller_gradients(calls):
    """Gradients that travel between ranks come back too small by a hundredth."""
    sound = collectives._Start.backward

    def broken(ctx, *grads):
        gradient, none = sound(ctx, *grads)
        return 0.99 * gradient, none

    collectives._Start.backward = staticmethod(broken)
    return train_each(calls)


def launch_broken(train, folder, ranks, calls):
    """In the place of the doctor's `launch`, whose ranks would import torch each time."""
    for of_rank in run_ranks(ranks, train_with_smaller_gradients, calls):
        assert [trained.code for trained in of_rank] == [0] * len(calls), of_rank
    return 0


@pytest.mark.slow
def test_the_doctor_finds_gradients_that_depend_on_where_experts_live(small, config, monkeypatch, capsys):
    monkeypatch.setattr(examination, "launch", launch_broken)
    assert main([str(config), *small, "--ranks", "2", "--steps", "4"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^FAIL  ranks 2, ep 2", out, re.MULTILINE), out
    assert re.search(r"^pass  ranks 2, ep 1", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "two"], "error: --ranks: should be numbers such as 1,2,4"),
        (["moe.num_experts=0"], "error: moe.num_experts: should be greater than 0"),
        (["--ranks", "3", "--real-shapes"], "error: train.global_batch_size: 4 is not a multiple of"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(small, config, capsys, arguments, message):
    assert main([str(config), *small, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1
