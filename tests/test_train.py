"""Whole runs through train.py's main: what they leave behind, stopping, resuming, failing."""

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from moe.checkpoint.reading import newest_checkpoint
from moe.inference.trained_run import load_model
from moe.model.initialization import init_weights
from moe.training.engine import Engine
from tests.conftest import read_lines

ROOT = Path(__file__).parent.parent

TRAIN_KEYS = {
    "step", "tokens", "loss/lm", "loss/load_balancing", "loss/router_z", "optim/lr", "optim/grad_norm",
    "perf/tokens_per_s", "perf/step_s", "perf/mfu", "moe/load_imbalance", "moe/dropped_fraction",
    "moe/router_entropy", "moe/dead_experts", "comm/dispatch_bytes", "optim/grad_norm/dense",
    "optim/grad_norm/router", "optim/grad_norm/experts",
}  # fmt: skip
SUMMARY_KEYS = {
    "params_total", "params_active", "flops_per_token", "final_train_loss", "final_eval_loss",
    "final_bits_per_byte", "tokens", "wall_s", "tokens_per_s", "cost",
}  # fmt: skip


def final_state(run):
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    return {
        f"{kind}/{name}": checkpoint.read(kind, name).view(entry.shape)
        for kind, named in checkpoint.tensors.items()
        for name, entry in named.items()
    }


def assert_same_run(run, other):
    assert read_lines(run) == read_lines(other)
    state, other_state = final_state(run), final_state(other)
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name


def test_a_run_leaves_the_files_of_the_contract(run_main):
    code, run, out, _ = run_main()
    assert code == 0
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "env.json", "metrics.jsonl", "summary.json", "loss.png", "sample.txt",
        "tokenizer.json", "checkpoints",
    }  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/lm" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(set(line) == TRAIN_KEYS for line in steps)
    assert [line["step"] for line in evaluations] == [6, 12]
    assert all({"step", "eval/loss", "eval/bits_per_byte"} <= set(line) for line in evaluations)
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] < 5.6
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["final_eval_loss"] == evaluations[-1]["eval/loss"]
    assert Image.open(run / "loss.png").size == (960, 600)
    assert len((run / "sample.txt").read_text()) > 100
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-00000008",
        "step-00000012",
    ]
    model, _, _ = load_model(run, torch.device("cpu"))
    assert summary["params_total"] == sum(p.numel() for p in model.parameters())
    environment = json.loads((run / "env.json").read_text())
    assert {"git_sha", "git_dirty", "versions", "processor"} <= set(environment)
    assert "parameters, active per token" in out


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


def test_resuming_twice_in_a_row_is_bit_exact(run_main):
    """The learning rates and the sample order of an interrupted run are those of the whole one."""
    _, whole, _, _ = run_main(folder="whole")
    real_step = Engine.step
    for stop_after in (4, 8):

        def step_then_interrupt(self, lr, stop_after=stop_after):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 2 * (4 if stop_after == 8 else stop_after):  # two micro batches a step
                signal.raise_signal(signal.SIGINT)
            return real_step(self, lr)

        Engine.step = step_then_interrupt
        try:
            code, run, out, _ = run_main(folder="interrupted")
        finally:
            Engine.step = real_step
        assert code == 130
        assert f"stopped and saved at step {stop_after} of 12" in out
        assert not (run / "summary.json").exists()
    code, run, out, _ = run_main(folder="interrupted")
    assert code == 0
    assert "resumed from" in out
    assert_same_run(run, whole)


def test_metrics_are_cut_back_to_the_checkpoint(run_main):
    _, run, _, _ = run_main()
    whole = read_lines(run)
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").glob("step-00000012*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss/')  # a line that a killed run left unfinished
    code, run, out, _ = run_main()
    assert code == 0
    assert "step-00000008" in out
    assert read_lines(run) == whole


def test_a_damaged_newest_checkpoint_is_replaced_by_the_one_before_with_a_warning(run_main):
    _, run, _, _ = run_main()
    whole = final_state(run)
    (run / "summary.json").unlink()
    weights = run / "checkpoints" / "step-00000012" / "00000-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    code, run, out, err = run_main()
    assert code == 0
    assert "step-00000012 is damaged (00000-00000.safetensors does not match its checksum)" in err
    assert "resumed from" in out
    assert (run / "checkpoints" / "damaged-step-00000012").exists()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in final_state(run).items())


def test_a_finished_run_is_left_alone_and_can_be_prolonged(run_main):
    _, run, _, _ = run_main()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _, out, _ = run_main()
    assert code == 0
    assert "is finished (12 steps); raise train.steps" in out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    code, run, _, _ = run_main("train.steps=14")
    assert code == 0
    assert read_lines(run)[-1]["step"] == 14
    assert run_main("train.steps=13")[0] == 2


def test_what_a_resumed_run_may_change(run_main):
    code, run, _, _ = run_main("train.steps=8")
    code, run, _, _ = run_main(
        "train.steps=12", "train.micro_batch_size=4", "parallel.zero_stage=2", "train.eval_interval=3",
        "log.interval=2", "train.activation_checkpointing=true", "run.resume=must",
    )  # fmt: skip
    assert code == 0
    assert read_lines(run)[-1]["step"] == 12


def test_a_non_finite_loss_stops_the_run_and_reaches_no_checkpoint(run_main, monkeypatch):
    real = train.F.cross_entropy
    calls = []

    def poisoned(*arguments, **keywords):
        calls.append(1)
        loss = real(*arguments, **keywords)
        return loss * float("nan") if len(calls) == 2 * 6 + 1 else loss

    monkeypatch.setattr(train.F, "cross_entropy", poisoned)
    code, run, _, err = run_main("train.eval_interval=12")
    assert code == 1
    assert err.count("\n") == 1
    assert "step 7: the loss is nan" in err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert all(torch.isfinite(tensor).all() for tensor in final_state(run).values())
    assert read_lines(run)[-1]["step"] == 6
    monkeypatch.undo()
    assert run_main("train.eval_interval=12")[0] == 0


def test_a_non_finite_gradient_reaches_no_checkpoint_either(run_main, monkeypatch):
    real = Engine.step
    monkeypatch.setattr(
        Engine,
        "step",
        lambda self, lr: (
            norms._replace(total=float("inf"))
            if (norms := real(self, lr)) and self._deepspeed.global_steps == 8
            else norms
        ),
    )
    code, run, _, err = run_main()
    assert code == 1
    assert "step 8: the gradient norm is inf" in err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]


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


@pytest.mark.parametrize("capacity_factor", ["null", "0.5"])
def test_evaluation_is_pure_dropless_cross_entropy_and_leaves_training_untouched(run_main, capacity_factor):
    capacity = f"moe.capacity_factor={capacity_factor}"
    _, often, _, _ = run_main(capacity, "train.eval_interval=1", folder="often")
    _, rarely, _, _ = run_main(capacity, "train.eval_interval=12", "train.eval_batches=2", folder="rarely")
    train_lines = [[line for line in read_lines(run) if "loss/lm" in line] for run in (often, rarely)]
    assert train_lines[0] == train_lines[1]
    model, tokenizer, config = load_model(rarely, torch.device("cpu"))
    # The same figure from the saved model, sample by sample, from the text's own bytes.
    text = Path(config.data.source).read_text()
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
        init_weights(model, seed)
        for block in model.blocks:
            torch.nn.init.zeros_(block.ffn.router.weight)

    monkeypatch.setattr(train, "init_weights", collapsed)
    line = read_lines(run_main("moe.aux_loss_coef=0.0", "train.steps=2")[1])[0]
    assert line["loss/load_balancing"] == pytest.approx(1.0)
    assert line["moe/load_imbalance"] == 2.0  # four experts, two in use
    assert line["moe/dead_experts"] == 2 * 2  # in each of two layers


def test_a_run_resumes_from_its_own_config_file(run_main, tmp_path):
    _, run, _, _ = run_main("train.steps=8")
    assert train.main([str(run / "config.yaml"), "train.steps=12"]) == 0
    assert read_lines(run)[-1]["step"] == 12


def test_a_prolonged_run_does_not_keep_the_old_results_while_it_runs(run_main, monkeypatch):
    _, run, _, _ = run_main("train.steps=4")
    assert (run / "summary.json").exists()
    real_step = Engine.step
    monkeypatch.setattr(
        Engine, "step", lambda self, lr: (signal.raise_signal(signal.SIGINT), real_step(self, lr))[1]
    )
    monkeypatch.setattr(train.StopRequest, "_ask", lambda self, *_: setattr(self, "made", True))
    assert run_main("train.steps=8")[0] == 130
    assert not (run / "summary.json").exists()


def test_the_ids_that_are_read_do_not_depend_on_the_micro_batch(run_main, monkeypatch):
    real, seen = train.read_samples, []
    monkeypatch.setattr(
        train, "read_samples", lambda tokens, ids, seq_len: (seen.append(ids), real(tokens, ids, seq_len))[1]
    )
    orders = []
    for micro in (1, 2, 4):
        seen.clear()
        run_main(f"train.micro_batch_size={micro}", folder=f"micro{micro}")
        orders.append([int(i) for ids in seen for i in ids])
    assert orders[0] == orders[1] == orders[2]
    assert len(orders[0]) == 12 * 4
