"""Whole runs through train.py's main: what they leave behind, and what changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from moe.inference.trained_run import load_run
from moe.model.initialization import initial_weights
from moe.training import zero_state
from tests.support.runs import assert_same_run, read_lines

TRAIN_KEYS = {
    "step", "tokens", "loss/lm", "loss/load_balancing", "loss/router_z",
    "optim/lr", "optim/grad_norm", "optim/skipped_steps",
    "perf/tokens_per_s", "perf/step_s", "perf/mfu", "moe/load_imbalance", "moe/dropped_fraction",
    "moe/max_vio", "moe/load_cv", "moe/load_entropy", "moe/top1_margin", "moe/logit_rms", "moe/logit_max",
    "moe/rank_imbalance", "moe/bias_range", "moe/router_entropy", "moe/dead_experts", "comm/dispatch_bytes",
    "optim/grad_norm/dense", "optim/grad_norm/router", "optim/grad_norm/experts",
}  # fmt: skip
SUMMARY_KEYS = {
    "params_total", "params_active", "flops_per_token", "final_train_loss", "final_eval_loss",
    "final_bits_per_byte", "final_eval_loss_by_text", "tokens", "wall_s", "tokens_per_s", "cost",
}  # fmt: skip


def test_a_run_leaves_the_files_of_the_contract(small, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*small, f"run.dir={run}"]) == 0
    out = capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "env.json", "metrics.jsonl", "summary.json", "loss.png", "router.png",
        "sample.txt", "run.lock", "tokenizer.json", "checkpoints",
    }  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/lm" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all({key for key in line if not key.startswith("moe/layers/")} == TRAIN_KEYS for line in steps)
    of_layers = {key for key in TRAIN_KEYS if key.startswith("moe/")}
    assert all(len(line[key.replace("moe/", "moe/layers/")]) == 2 for line in steps for key in of_layers)
    assert [line["step"] for line in evaluations] == [6, 12]
    assert all({"step", "eval/loss", "eval/bits_per_byte"} <= set(line) for line in evaluations)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] < 5.6
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["final_eval_loss"] == evaluations[-1]["eval/loss"]
    assert Image.open(run / "loss.png").size == (960, 600)
    assert Image.open(run / "router.png").size == (900, 800)
    assert len((run / "sample.txt").read_text()) > 100
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000012",
    ]
    assert summary["params_total"] == sum(p.numel() for p in load_run(run).model.parameters())
    environment = json.loads((run / "env.json").read_text())
    assert {"git_sha", "git_dirty", "versions", "processor"} <= set(environment)
    assert environment["cores"]
    assert "active for a token" in out


def test_a_finished_run_reports_what_it_cost(run_main):
    rates = ["cost.peak_flops=1e12", "cost.watts=90", "cost.usd_per_hour=0.2", "cost.pue=1.5"]
    _, run, _, _ = run_main(*rates, folder="priced")
    summary = json.loads((run / "summary.json").read_text())
    cost, hours = summary["cost"], summary["wall_s"] / 3600
    assert cost["flops"] == summary["tokens"] * summary["flops_per_token"]
    assert cost["utilisation"] == pytest.approx(cost["flops"] / (summary["wall_s"] * 1e12))
    assert cost["usd"] == pytest.approx(0.2 * hours)
    assert cost["kwh"] == pytest.approx(0.09 * 1.5 * hours)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in steps if "perf/mfu" in line)
    assert line["perf/mfu"] == pytest.approx(line["perf/tokens_per_s"] * summary["flops_per_token"] / 1e12)


def test_two_runs_are_bit_equal(run_main):
    assert_same_run(run_main(folder="a")[1], run_main(folder="b")[1])


@pytest.mark.parametrize(
    "changes",
    [["train.micro_batch_size=4"], ["train.micro_batch_size=1"], ["parallel.zero_stage=2"]],
    ids=str,
)
def test_micro_batch_and_zero_stage_change_neither_samples_nor_losses(run_main, changes):
    _, run, _, _ = run_main(folder="a")
    _, other, _, _ = run_main(*changes, folder="b")
    for line, other_line in zip(read_lines(run), read_lines(other), strict=True):
        for key in {"loss/lm", "loss/load_balancing", "loss/router_z", "eval/loss"} & line.keys():
            assert line[key] == pytest.approx(other_line[key], rel=1e-5), (line["step"], key)
        if "loss/lm" in line:
            assert line["optim/grad_norm"] == pytest.approx(other_line["optim/grad_norm"], rel=1e-4)


def test_named_validation_texts_have_losses_of_their_own(run_main, tmp_path):
    held_out, other = tmp_path / "held_out.txt", tmp_path / "other.txt"
    held_out.write_text("return self\n" * 100)
    other.write_text("ZZZZ qqqq\n" * 100)
    sources = [f"data.extra_validation.same={held_out}", f"data.extra_validation.other={other}"]
    _, run, _, _ = run_main(f"data.validation={held_out}", *sources)
    evaluations = [line for line in read_lines(run) if "eval/loss" in line]
    assert len(evaluations) == 2
    for line in evaluations:
        assert line["eval/same/loss"] == line["eval/loss"]
        assert line["eval/same/bits_per_byte"] == line["eval/bits_per_byte"]
        assert line["eval/other/loss"] != line["eval/loss"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_eval_loss"] == evaluations[-1]["eval/loss"]
    by_text = {name: evaluations[-1][f"eval/{name}/loss"] for name in ("same", "other")}
    assert summary["final_eval_loss_by_text"] == by_text


@pytest.mark.parametrize("capacity_factor", ["null", "0.5"])
def test_evaluation_is_pure_dropless_cross_entropy_and_leaves_training_untouched(run_main, capacity_factor):
    capacity = f"moe.capacity_factor={capacity_factor}"
    _, often, _, _ = run_main(capacity, "train.eval_interval=1", folder="often")
    _, rarely, _, _ = run_main(capacity, "train.eval_interval=12", "train.eval_batches=2", folder="rarely")
    train_lines = [[line for line in read_lines(run) if "loss/lm" in line] for run in (often, rarely)]
    assert train_lines[0] == train_lines[1]
    trained = load_run(rarely)
    model, tokenizer = trained.model, trained.tokenizer
    # The same figure from the saved model, sample by sample, from the text's own bytes.
    text = Path(trained.config.data.source).read_text()
    validation = text[text.rfind("\n", 0, len(text) - len(text) // 20) + 1 :]
    ids = torch.tensor([*tokenizer.encode(validation).ids, tokenizer.token_to_id("<|endoftext|>")])
    places = torch.linspace(0, (len(ids) - 1) // 32 - 1, 8, dtype=torch.float64).round().long()
    losses = []
    for place in places.tolist():
        window = ids[place * 32 : place * 32 + 33]
        log_probs = model(window[None, :-1]).logits[0].log_softmax(1)
        losses += [-log_probs[i, token].item() for i, token in enumerate(window[1:].tolist())]
    assert read_lines(rarely)[-1]["eval/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    expected_bits = sum(losses) / len(losses) / 0.6931471805599453 * len(ids) / len(validation.encode())
    assert read_lines(rarely)[-1]["eval/bits_per_byte"] == pytest.approx(expected_bits, rel=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.num_experts=1", "moe.top_k=1"],
        ["moe.capacity_factor=0.75"],
        ["parallel.precision=bf16"],
        ["model.tie_embeddings=false", "moe.first_dense_layers=1"],
        ["moe.top_k=1", "moe.normalize_gate_weights=false"],
    ],
    ids=str,
)
def test_every_kind_of_model_trains(run_main, overrides):
    code, run, _, _ = run_main(*overrides)
    assert code == 0
    lines = read_lines(run)
    assert lines[-1]["eval/loss"] < 5.3
    first = lines[0]
    if "moe.num_experts=1" in overrides:
        assert first["moe/load_imbalance"] is None
        assert first["loss/load_balancing"] is None
    else:
        assert first["moe/load_imbalance"] >= 1
        assert (first["moe/dropped_fraction"] > 0) == ("moe.capacity_factor=0.75" in overrides)


@pytest.mark.slow
@pytest.mark.parametrize("num_experts", [2, 4, 8, 16])
def test_500_steps_stay_finite_with_no_dead_expert(run_main, num_experts):
    code, run, _, _ = run_main(
        f"moe.num_experts={num_experts}", "moe.num_shared_experts=0", "moe.d_ff_expert=16", "train.steps=500",
        "train.global_batch_size=16", "train.micro_batch_size=16", "optim.warmup_steps=50",
        "train.eval_interval=500", "train.checkpoint_interval=500", "log.interval=50",
    )  # fmt: skip
    assert code == 0
    lines = [line for line in read_lines(run) if "loss/lm" in line]
    assert [line["moe/dead_experts"] for line in lines[-2:]] == [0, 0]
    assert lines[-1]["loss/lm"] < 3.2


def test_the_collapse_metrics_fire_where_the_balance_loss_is_blind(run_main, monkeypatch):
    """Equal probabilities, and ties that all fall on the same experts: the loss is 1.0, the load is not."""

    def collapsed(model, seed):
        for name, parameter, values in initial_weights(model, seed):
            yield name, parameter, values * (".router." not in name)

    monkeypatch.setattr(zero_state, "initial_weights", collapsed)
    line = read_lines(run_main("moe.aux_loss_coef=0.0", "train.steps=2")[1])[0]
    assert line["loss/load_balancing"] == pytest.approx(1.0)
    assert line["moe/load_imbalance"] == 2.0  # four experts, two in use
    assert line["moe/dead_experts"] == 2 * 2  # in each of two layers


def test_the_samples_of_each_step_do_not_depend_on_the_micro_batch(run_main, monkeypatch):
    real, seen = train.read_batches, []

    def read_and_note(config, text, starts, device, step):
        seen.extend((step, start) for start in starts.tolist())
        return real(config, text, starts, device, step)

    monkeypatch.setattr(train, "read_batches", read_and_note)
    orders = []
    for micro in (1, 2, 4):
        seen.clear()
        run_main(f"train.micro_batch_size={micro}", folder=f"micro{micro}")
        orders.append(list(seen))
    assert orders[0] == orders[1] == orders[2]
    assert [step for step, _ in orders[0]] == [step for step in range(12) for _ in range(4)]
