"""How train.py starts: its arguments, its first lines, and what it says before it loads anything."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import train
from moe.config import load_config
from tests.support.commands import assert_refused
from tests.support.paths import CONFIGS, TRAIN
from tests.support.runs import read_lines


@pytest.fixture
def without_torch(tmp_path):
    """Call train.py in a process that ends when it imports torch: its exit code, stdout and stderr."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "torch.py").write_text("raise SystemExit('torch is imported')")

    def call(*arguments: str, **environment: str) -> tuple[int, str, str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "modules")} | environment
        command = [sys.executable, str(TRAIN), *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        return ended.returncode, ended.stdout, ended.stderr

    return call


def test_help_and_refusals_come_before_torch_is_imported(without_torch):
    code, out, err = without_torch("--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: train.py")
    code, out, err = without_torch("--print-config", "moe.top_k=1", "moe.normalize_gate_weights=false")
    assert (code, err) == (0, "")
    assert "top_k: 1\n" in out
    code, out, err = without_torch("moe.top_k=9")
    assert (code, out) == (2, "")
    assert err == "error: moe.top_k: 9 is more than moe.num_experts (8); lower it or add experts\n"
    for key in ("data.source", "data.validation", "data.extra_validation.a"):
        code, out, err = without_torch(f"{key}=missing.txt")
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {key.removesuffix('.a')}: no such file: missing.txt; give a path")
    code, _, err = without_torch("data.sources.a.source=missing.txt", "data.sources.a.weight=1")
    assert err.startswith("error: data.sources.a.source: no such file: missing.txt; give a path")


def test_one_rank_says_that_it_starts_before_torch_is_imported(without_torch):
    assert without_torch("run.name=first") == (
        1, "runs/first: loading PyTorch and DeepSpeed\n", "torch is imported\n"
    )  # fmt: skip
    assert without_torch(RANK="1")[1] == ""
    assert "loading" in without_torch(RANK="0")[1]


def test_help_says_which_values_a_key_may_have(capsys):
    assert train.main(["--help", "moe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(".")[0].strip() for line in lines] == ["moe"] * 19
    assert any(line.split()[:4] == ["moe.num_experts", "int", ">", "0"] for line in lines)
    assert any(" ".join(line.split()).startswith("moe.capacity_factor float > 0 | null =") for line in lines)
    assert train.main(["--help", "moe.top_k"]) == 0
    assert capsys.readouterr().out.splitlines() == [line for line in lines if "moe.top_k " in line]
    assert train.main(["--help", "data"]) == 0
    shown = capsys.readouterr().out
    assert " ".join(shown.split("data.validation_share")[1].split()[:8]) == "float >= 0 and < 1 = 0.05"


def test_a_run_continues_by_the_name_of_its_folder_wherever_it_lies(run_main, tmp_path, capsys):
    _, run, _, _ = run_main()
    moved = tmp_path / "a=b"
    shutil.move(run, moved)
    assert train.main(["train.steps=14", str(moved)]) == 0
    assert "resumed from" in capsys.readouterr().out
    assert read_lines(moved)[-1]["step"] == 14
    assert not run.exists()


def test_the_configuration_may_come_after_overrides(capsys):
    assert train.main(["optim.lr=0.5", str(CONFIGS / "tiny_dense.yaml"), "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "lr: 0.5" in shown
    assert "name: tiny_dense" in shown


def test_the_warm_up_of_the_default_configuration_follows_its_steps():
    assert load_config(CONFIGS / "tiny.yaml").warmup_steps == 60
    assert load_config(CONFIGS / "tiny.yaml", ["train.steps=20"]).warmup_steps == 1
    assert load_config(CONFIGS / "tiny.yaml", ["train.steps=20", "optim.warmup_steps=9"]).warmup_steps == 9


def test_a_width_that_is_no_multiple_of_eight_trains(run_main):
    """As that of nanoGPT's feed-forward block at equal FLOPs: 341."""
    widths = ("moe.d_ff_expert=41", "model.d_model=36", "model.n_heads=2", "model.n_kv_heads=1")
    code, run, _, _ = run_main(*widths, "moe.num_shared_experts=0", "model.vocab_size=300")
    assert code == 0
    # A layer: query and output, key and value, their norms, two more norms, the router, four experts.
    layer = 2 * 36 * 36 + 2 * 36 * 18 + 2 * 18 + 2 * 36 + 4 * 36 + 4 * 3 * 36 * 41
    assert json.loads((run / "summary.json").read_text())["params_total"] == 2 * layer + 36 + 2 * 300 * 36


def test_a_start_says_in_five_lines_what_matters(run_main):
    """By hand: 12 steps of 4 samples of 32 tokens are 1,536 tokens."""
    _, run, out, _ = run_main()
    first = out.splitlines()[:5]
    assert [line.split(":")[0].strip() for line in first] == [
        "model", "parameters", "FLOPs", "memory", "text",
    ]  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert first[0].endswith("2 layers of width 32, 4 experts, top-2")
    assert f"{summary['params_total']:,}, {summary['params_active']:,} active" in first[1]
    per_token = summary["flops_per_token"]
    assert f"{per_token / 1e3:.3g}k a token in training" in first[2]
    assert f"{per_token * 1536 / 1e6:.3g}M in 12 steps" in first[2]
    assert "the run reads 1,536, " in first[4]


def test_lines_of_a_log_say_how_much_time_is_left(run_main):
    _, _, out, _ = run_main("train.steps=4")
    left = [line.rsplit(", ", 1)[1] for line in out.splitlines() if ": loss" in line]
    assert len(left) == 4
    assert all(text.endswith(" left") for text in left)
    assert left[-1] == "00:00 left"


def test_two_configurations_are_refused(capsys):
    expected = "error: CONFIG: a.yaml and b.yaml are two configurations; give one"
    assert_refused(train.main, ["a.yaml", "b.yaml"], expected, capsys)


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_one_line_and_a_log(small, tmp_path):
    environment = os.environ | {"CXX": "/bin/false", "TORCHDYNAMO_DISABLE": "0"}
    arguments = [*small, f"run.dir={tmp_path / 'run'}", "train.compile=true", "model.n_layers=1"]
    command = [sys.executable, str(TRAIN), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("error: train.compile failed (InvalidCxxCompiler: No working C++ compiler found")
    assert f"; see {tmp_path / 'run' / 'compile.log'}, or set it to false" in line
    assert "Traceback" in (tmp_path / "run" / "compile.log").read_text()
    assert "InvalidCxxCompiler" in (tmp_path / "run" / "failure.txt").read_text()
