"""scripts/bench.py: tables and JSON of how fast it is."""

import json
import os
import subprocess
import sys

import pytest
import torch

from moe.benchmark import processes
from moe.benchmark.contenders import ModuleContender
from scripts import bench
from scripts.bench import main
from tests.support.commands import exit_code
from tests.support.paths import ROOT, TINY

LAYER = ["layer", "--experts", "2", "--tokens", "16", "--repeats", "2"]
LAYER_KEYS = {
    "contender", "num_experts", "tokens", "top_k", "d_model", "d_ff_expert", "forward_ms",
    "forward_backward_ms", "backward_ms", "peak_mib", "relative_to_dense", "forward_backward_quartiles_ms",
    "repeats",
}  # fmt: skip
MACHINE_KEYS = {"git_sha", "git_dirty", "versions", "processor", "cores", "threads", "gpu", "command"}


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """How often this process was told to keep freed memory, which it is not."""
    calls = []
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: calls.append(1))
    return calls


def document(capsys, arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    found = json.loads(printed.out)
    assert list(found) == ["machine", "results"]
    assert set(found["machine"]) >= MACHINE_KEYS
    return found


def test_layer_prints_one_json_document(capfd, kept):
    found = document(capfd, [*LAYER, "--top-k", "1,2", "--contenders", "moe,dense,gemm_floor"])
    assert [(record["contender"], record["top_k"]) for record in found["results"]] == [
        (name, top_k) for top_k in (1, 2) for name in ("moe", "dense", "gemm_floor")
    ]
    for record in found["results"]:
        assert set(record) == LAYER_KEYS
        assert record["d_ff_expert"] * record["top_k"] == 2048
        assert (record["d_model"], record["repeats"]) == (512, 2)
    machine = found["machine"]
    assert (machine["threads"], machine["precision"]) == (torch.get_num_threads(), "fp32")
    assert machine["keeps_freed_memory"] == ["moe", "dense", "gemm_floor"]
    assert {"torch", "deepspeed", "transformers"} <= set(machine["versions"])
    assert len(kept) == 1


def test_layer_prints_a_table_and_draws(capsys, kept, tmp_path):
    picture = tmp_path / "speed.png"
    options = ["--contenders", "moe,dense", "--default-allocator", "--plot", str(picture)]
    assert main([*LAYER, *options]) == 0
    header, moe, dense = capsys.readouterr().out.splitlines()[:3]
    assert header.split()[:3] == ["contender", "experts", "tokens"]
    assert (moe.split()[0], dense.split()[0]) == ("moe", "dense")
    assert picture.exists()
    assert kept == []


def test_layers_that_compute_something_else_at_top_1_are_left_out_by_name(capsys, monkeypatch):
    monkeypatch.setattr(bench, "CONTENDERS", ("dense", "hf_grouped_mm"))
    assert main([*LAYER, "--top-k", "1"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Left out at top-1, where they compute something else: hf_grouped_mm\n")


def test_a_contender_with_other_weights_is_refused_by_name_and_nothing_is_printed(capsys, monkeypatch):
    build = processes.build_contender

    def with_other_weights(name, problem):
        contender = build(name, problem)
        assert isinstance(contender, ModuleContender)
        if name == "hf_grouped_mm":
            weights = dict(contender.module.named_parameters())
            with torch.no_grad():
                weights["experts.down_proj"][1] *= 1.001
        return contender

    monkeypatch.setattr(processes, "build_contender", with_other_weights)
    assert main([*LAYER, "--contenders", "moe,hf_grouped_mm"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: hf_grouped_mm: its output is not that of the reference")
    assert printed.err.count("\n") == 1


def test_step_measures_configurations_through_train(capsys, small):
    dense = [TINY.with_name("tiny_dense.yaml")]
    shrunk = [item for item in small if not item.startswith(("moe.num_experts", "moe.top_k"))]
    found = document(capsys, ["step", TINY, *dense, *shrunk, "--steps", "2"])
    assert [record["config"] for record in found["results"]] == [str(TINY), str(*dense)]
    assert found["machine"]["steps"] == 2
    assert main(["step", str(TINY), *small, "--steps", "1"]) == 0
    header, row, floor, *note = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["to", "the", "first"]
    assert row.startswith(str(TINY))
    assert floor.startswith("  floor")
    assert "plain" in " ".join(note)


@pytest.mark.slow
def test_dispatch_on_real_ranks(small):
    options = [*small, "--ranks", "1,2", "--repeats", "1", "--json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), "dispatch", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [record["ranks"] for record in found["results"]] == [1, 2]
    assert [sum(record["rows_per_rank"]) for record in found["results"]] == [4 * 32 * 2] * 2
    assert found["machine"]["config"].endswith("tiny.yaml")


def test_dispatch_notes_that_ranks_wait_for_cores(capsys, small, monkeypatch):
    record = {
        "ranks": 8, "experts_per_rank": 1, "tokens_per_rank": 64, "rows_per_rank": [10, 30],
        "routed_flops_per_rank": [1e9, 3e9], "dispatch_bytes_per_rank": [2**10] * 8,
        "expected_dispatch_bytes": 1024.0, "expected_step_bytes": 4096, "layer_ms": 1.5,
        "layer_quartiles_ms": [1.0, 2.0],
    }  # fmt: skip
    monkeypatch.setattr(bench, "measure_dispatch", lambda config, repeats: record)
    assert main(["dispatch", *small, "--ranks", "2"]) == 0
    _, row, *note = capsys.readouterr().out.splitlines()
    assert row.split()[:9] == ["8", "1", "64", "20", "30", "2.000", "1.0", "1.0", "4.0"]
    assert f"This machine has {os.cpu_count()} cores" in note[-1]


def test_generate_measures_a_run_and_a_configuration(capsys, run_main, small):
    _, run, _, _ = run_main()
    options = ["--new-tokens", "4", "--repeats", "2"]
    (trained,) = document(capsys, ["generate", run, *options])["results"]
    (fresh,) = document(capsys, ["generate", "--config", TINY, *small, *options])["results"]
    assert trained["params"] == fresh["params"]
    assert (trained["model"], fresh["model"]) == (str(run), str(TINY))
    assert main(["generate", str(run), *options]) == 0
    assert capsys.readouterr().out.startswith("model")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: what"),
        (["nothing"], "argument what: invalid choice: 'nothing'"),
        (["layer", "--experts", "8,x"], "argument --experts: should be numbers such as 8,64, got '8,x'"),
        (["layer", "--experts", "2", "--top-k", "4"], "--experts: 2 is too few for top-4"),
        (["layer", "--top-k", "3"], "--top-k: 2048 / 3 is no multiple of 8"),
        (["layer", "--threads", "0"], "argument --threads: should be a whole number above 0"),
        (["layer", "--budget", "-1"], "argument --budget: should be a number above 0"),
        (["layer", "--contenders", "moe,abacus"], "--contenders: 'abacus' is not one of moe, "),
        (["layer", "--top-k", "1", "--contenders", "hf_eager"], "--contenders: hf_eager computes something"),
        (["layer", "--plot", "speed.pdf"], "--plot: speed.pdf should be a .png file"),
        (["layer", "--plot", "nowhere/speed.png"], "--plot: nowhere/speed.png should be a .png file"),
        (
            ["layer", "--plot", "speed.png", "--contenders", "moe"],
            "--plot: speeds are drawn relative to dense",
        ),
        (["step"], "the following arguments are required: CONFIG | key=value"),
        (["step", "moe.top_k=1"], "CONFIG: give a YAML file"),
        (["step", "nowhere.yaml"], "CONFIG: cannot read nowhere.yaml"),
        (["step", "configs/tiny.yaml", "moe.top_k=99"], "moe.top_k: 99 is more than moe.num_experts"),
        (["step", "configs/tiny.yaml", "parallel.ep_size=2"], "parallel.ep_size: 2 "),
        (["dispatch", "--ranks", "3"], "--ranks: 3 ranks cannot share 8 experts and 8 sequences"),
        (["dispatch", "a.yaml", "b.yaml"], "CONFIG: give one YAML file, not 2"),
        (["dispatch", "configs/tiny_dense.yaml"], "moe.num_experts: 1 is a dense model"),
        (["generate"], "RUN: give one run folder such as runs/tiny"),
        (["generate", "nowhere"], "RUN: nowhere is not a run folder"),
        (["generate", "runs/tiny", "moe.top_k=1"], "RUN: give one run folder"),
        (["generate", "runs/tiny", "--config", "configs/tiny.yaml"], "RUN: give one run folder"),
    ],
    ids=" ".join,
)
def test_bad_input_gets_one_line_and_exit_2(capsys, monkeypatch, arguments, complaint):
    monkeypatch.chdir(ROOT)
    code = exit_code(main, arguments)
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith(f"error: {complaint}")
