"""The doctor passes a sound trainer and fails a broken one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def examine(root, config, *arguments):
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "doctor.py"), str(config), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def config(tmp_path):
    """A file without sections' keys; the test's own overrides make the model."""
    path = tmp_path / "config.yaml"
    path.write_text("run: {name: doctor}\n")
    return path


@pytest.mark.slow
def test_the_doctor_passes_and_prints_a_line_per_check(small, config):
    done = examine(ROOT, config, *small, "--ranks", "1,2", "--steps", "4")
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


@pytest.mark.slow
def test_the_doctor_finds_gradients_that_depend_on_where_experts_live(small, config, tmp_path):
    """In a copy in which gradients that travel between ranks come back too small by a hundredth."""
    broken = tmp_path / "broken"
    for part in ("moe", "scripts"):
        shutil.copytree(ROOT / part, broken / part)
    shutil.copy(ROOT / "train.py", broken)
    collectives = broken / "moe" / "distributed" / "collectives.py"
    text = collectives.read_text()
    assert "return ctx.exchange._end(), None" in text
    collectives.write_text(
        text.replace("return ctx.exchange._end(), None", "return 0.99 * ctx.exchange._end(), None")
    )
    done = examine(broken, config, *small, "--ranks", "2", "--steps", "4")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^FAIL  ranks 2, ep 2", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^pass  ranks 2, ep 1", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "two"], "error: --ranks: should be numbers such as 1,2,4"),
        (["moe.num_experts=0"], "error: moe.num_experts: should be greater than 0"),
        (["--ranks", "3", "--real-shapes"], "error: train.global_batch_size: 4 is not a multiple of"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(small, config, arguments, message):
    done = examine(ROOT, config, *small, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
