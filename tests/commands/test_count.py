"""scripts/count.py: tables and JSON of what a model is and costs."""

import json
import os
import subprocess
import sys

import pytest

from moe.config import dump_config, load_config
from scripts.count import main
from tests.support.commands import exit_code
from tests.support.paths import ROOT

ZOO = sorted(map(str, (ROOT / "configs" / "zoo").glob("*.yaml")))
KEYS = {
    "name", "total", "active_all", "active_no_input_emb", "active_no_emb", "by_part",
    "flops_per_token_forward", "flops_per_token_train", "sparsity",
}  # fmt: skip


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_json_is_an_object_for_one_model_and_a_list_for_several(capsys):
    record = json.loads(run(capsys, ROOT / "configs" / "tiny.yaml", "--json")[1])
    assert set(record) >= KEYS
    assert (record["name"], record["total"], record["active_all"]) == ("tiny", 3_675_264, 1_315_968)
    assert record["sparsity"] == pytest.approx(3_675_264 / 1_315_968)
    records = json.loads(run(capsys, *ZOO, "--json")[1])
    assert len(records) == len(ZOO)
    assert all(set(record) >= KEYS for record in records)


def test_the_table_has_a_row_per_model_with_exact_counts(capsys):
    _, out, _ = run(capsys, *ZOO)
    assert len(out.splitlines()) == 2 + len(ZOO) + 1
    row = next(line for line in out.splitlines() if line.startswith("Mixtral-8x7B")).split()
    assert row[1:5] == ["46,702,792,704", "12,879,925,248", "12,748,853,248", "12,617,781,248"]
    assert max(map(len, out.splitlines())) <= 120
    assert out.endswith(", in sequences of 4,096 tokens\n")
    _, out, _ = run(capsys, *ZOO, ROOT / "configs" / "tiny.yaml")
    assert out.endswith(", in sequences of 4,096 tokens (tiny: 128)\n")


def test_one_model_is_shown_part_by_part_and_its_unlike_layers(capsys):
    _, out, _ = run(capsys, ROOT / "configs" / "zoo" / "deepseek_moe_16b.yaml")
    assert "routed_experts" in out
    assert "layer 0: 84,021,248 = attention 16,777,216" in out
    assert "layers 1 to 27, each:" in out


def test_overrides_and_the_sequence_length_apply(capsys):
    config = ROOT / "configs" / "tiny.yaml"
    plain, wide, long = (
        json.loads(run(capsys, config, "--json", *more)[1])
        for more in ([], ["moe.num_experts=16"], ["--seq-len", "1024"])
    )
    assert wide["total"] - plain["total"] == 4 * 8 * (3 * 128 * 256 + 128)  # layers, experts, weights, router
    assert long["total"] == plain["total"]
    assert long["flops_per_token_forward"] > plain["flops_per_token_forward"]


def test_on_gpus_it_adds_cost_and_placements(capsys):
    config = ROOT / "configs" / "zoo" / "olmoe_1b_7b.yaml"
    options = ["--gpu", "h100", "--tokens", "5e12"]
    code, out, _ = run(capsys, config, *options)
    assert code == 0
    assert "on 8 x H100" in out
    assert "8 GPUs are assumed; --gpus sets another number" in out
    assert "are assumed" not in run(capsys, config, *options, "--gpus", "8")[1]
    assert "GPU-hours at 40% utilisation" in out
    record = json.loads(run(capsys, config, *options, "--json")[1])
    flops = 5e12 * record["flops_per_token_train"]
    assert record["cost"]["device_hours"] == pytest.approx(flops / (0.4 * 989e12) / 3600)
    days = flops / (0.4 * 989e12) / 3600 / 24 / 8
    (printed,) = [line.split()[1] for line in out.splitlines() if line.split()[:1] == ["days"]]
    assert float(printed) == pytest.approx(days, rel=0.01)
    assert record["placements"][0]["fits"]
    assert [place["ep_size"] for place in record["placements"] if place["yours"]] == [1]


def test_the_tokens_that_are_asked_for_come_before_those_of_the_configuration(capsys):
    steps = ["train.steps=100", "train.global_batch_size=64", "data.seq_len=125"]  # 8e5 tokens
    call = [ROOT / "configs" / "tiny.yaml", "data.tokenizer=bytes", *steps, "--gpu", "h100", "--json"]
    own, asked = (
        json.loads(run(capsys, *call, *option)[1])["cost"]["device_hours"]
        for option in ([], ["--tokens", "3e9"])
    )
    assert asked == pytest.approx(3e9 / 8e5 * own)


def test_without_a_run_name_the_file_names_the_model(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {vocab_size: 300, d_model: 64}")
    assert (
        json.loads(run(capsys, tmp_path / "mine.yaml", "data.tokenizer=bytes", "--json")[1])["name"] == "mine"
    )


def test_the_folder_of_a_run_is_counted_by_its_configuration(capsys, tmp_path):
    config = load_config(ROOT / "configs" / "tiny.yaml", ["run.name=mine", "moe.num_experts=16"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    record = json.loads(run(capsys, tmp_path, "--json")[1])
    assert (record["name"], record["total"]) == ("mine", 3_675_264 + 4 * 8 * (3 * 128 * 256 + 128))


def test_a_hugging_face_model_in_the_place_of_a_configuration_gets_a_hint(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "config.json"):
        code, _, err = run(capsys, path)
        fix = f"for a Hugging Face model, write --hf {path}"
        assert (code, err) == (2, f"error: CONFIG: {path} is not a YAML file; {fix}\n")


def test_a_table_of_the_zoo_takes_less_than_five_seconds_and_no_torch():
    script = f"""
import sys
sys.argv = ["count.py", *{ZOO!r}]
import runpy
try:
    runpy.run_path({str(ROOT / "scripts" / "count.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    started = os.times().children_user
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)
    assert os.times().children_user - started < 5  # processor time: the machine may be busy


def test_a_model_of_a_trillion_parameters_takes_no_more_memory_than_a_tiny_one():
    def peak(*arguments):
        script = (
            "import resource; from scripts.count import main; "
            f"main({list(arguments)!r}); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return int(done.stdout.splitlines()[-1]), done.stdout

    huge = [
        "model.d_model=8192",
        "model.n_layers=100",
        "moe.num_experts=128",
        "moe.d_ff_expert=4096",
        "--json",
    ]
    small_peak, _ = peak("configs/tiny.yaml", "--json")
    huge_peak, printed = peak("configs/tiny.yaml", *huge)
    assert json.loads(printed[: printed.rindex("}") + 1])["total"] > 1e12
    assert huge_peak < 1.05 * small_peak


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "CONFIG: give a YAML file"),
        (["nowhere.yaml"], "CONFIG: cannot read nowhere.yaml"),
        (["configs/tiny.yaml", "moe.top_k=99"], "moe.top_k: 99 is more than moe.num_experts"),
        (["configs/tiny.yaml", "--gpu", "abacus"], "--gpu: 'abacus' is not known"),
        (["configs/tiny.yaml", "--gpu", "h100", "--gpus", "0"], "argument --gpus: should be a whole number"),
        (
            ["configs/tiny.yaml", "--gpu", "h100", "--gpus", "3"],
            "train.global_batch_size: 8 is not a multiple of train.micro_batch_size (8) x 3 ranks; use 24, "
            "or another --gpus than 3",
        ),
        (
            ["configs/tiny.yaml", "--gpu", "h100", "--mfu", "nan"],
            "argument --mfu: should be a number above 0",
        ),
        (
            ["configs/tiny.yaml", "--gpu", "h100", "--mfu", "4"],
            "argument --mfu: should be above 0 and at most",
        ),
        (
            ["configs/tiny.yaml", "--tokens", "1e9"],
            "--gpu: --gpus, --tokens and --mfu need it; name one of V100",
        ),
        (["configs/zoo/mixtral_8x7b.yaml", "--gpu", "h100"], "--tokens: Mixtral-8x7B does not say"),
        (["configs/tiny.yaml", "data.tokenizer=bpe:0"], "data.tokenizer: 'bpe:0' should be bpe:N"),
        (
            ["configs/tiny.yaml", "model.vocab_size=10"],
            "model.vocab_size: 10 is less than the tokenizer's 1024",
        ),
        (["moe.top_k=4", "--hf", "somewhere"], "--hf: takes no overrides but cost.*"),
        (["configs/tiny.yaml", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_gets_one_line_and_exit_2(capsys, monkeypatch, arguments, complaint):
    monkeypatch.chdir(ROOT)
    code = exit_code(main, arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith(f"error: {complaint}")
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
