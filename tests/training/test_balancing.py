"""Balance over the global batch: the same on any topology, and biases that balance without a loss."""

import shutil

import pytest
import torch

import train
from moe.config import Config, ModelConfig, MoEConfig
from moe.inference.trained_run import load_run
from moe.model.transformer import Transformer
from moe.training.balancing import update_expert_biases
from tests.support.runs import final_state, read_lines
from tests.support.training import train_on_ranks

TOLERANCE = 2e-5  # fp32 sums in another order, over 12 steps


def biases_after(counts, rate=0.01, before=None):
    """The biases of a layer of E experts after one update."""
    moe = MoEConfig(num_experts=len(counts), d_ff_expert=8, bias_update_rate=0.5)
    model = Transformer(Config(model=ModelConfig(d_model=8, n_layers=1, n_heads=2, vocab_size=9), moe=moe))
    bias = model.get_buffer("blocks.0.ffn.router.expert_bias")
    bias.copy_(torch.zeros(len(counts)) if before is None else torch.tensor(before))
    update_expert_biases(model, torch.tensor([counts]), rate)
    return bias.tolist()


def test_one_step_moves_each_bias_by_exactly_the_rate():
    assert biases_after([7, 1, 5, 3]) == pytest.approx([-0.01, 0.01, -0.01, 0.01], abs=1e-9)
    assert biases_after([4, 4, 4, 4]) == [0, 0, 0, 0], "a balanced layer stays"
    again = biases_after([9, 4, 4, 3, 0, 4], before=[0.3, 0.0, 0.0, 0.0, -0.3, 0.0])
    assert again == pytest.approx([0.29, 0, 0, 0.01, -0.29, 0], abs=0.01 / 6 + 1e-7), "their sum was 0.01"


def test_biases_have_mean_0_which_changes_no_difference_between_them():
    biases = biases_after([90, 2, 2, 2])  # -0.01, +0.01, +0.01, +0.01, of mean 0.005
    assert biases == pytest.approx([-0.015, 0.005, 0.005, 0.005], abs=1e-9)


def test_an_imbalanced_start_is_balanced_by_biases_alone(run_main):
    """MaxVio is the largest load over the mean, less 1 (Wang et al. 2024)."""
    no_loss = [
        "moe.aux_loss_coef=0",
        "moe.z_loss_coef=0",
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
    ]
    steps = ["train.steps=300", "log.interval=10", "train.eval_interval=300", "train.checkpoint_interval=300"]
    last = {}
    for rate in (0.0, 0.005):
        code, run, _, _ = run_main(*no_loss, *steps, f"moe.bias_update_rate={rate}", folder=str(rate))
        assert code == 0
        imbalances = [line["moe/load_imbalance"] for line in read_lines(run) if "moe/load_imbalance" in line]
        last[rate] = sum(imbalances[-5:]) / 5 - 1
    assert last[0.005] < 0.2 < last[0.0], last


GLOBAL_AND_BIAS = ["moe.aux_loss_scope=global_batch", "moe.bias_update_rate=0.01"]
TOP_1 = ["moe.top_k=1", "moe.normalize_gate_weights=false"]
RULES = {
    "global loss": ["moe.aux_loss_scope=global_batch", "moe.aux_loss_coef=1.0"],
    "switch": ["moe.router=switch", "model.dropout=0", "moe.router_jitter=0.3", *TOP_1],
    "noisy": ["moe.router=noisy_topk", "model.dropout=0", *GLOBAL_AND_BIAS],
    "biased groups": [
        "moe.router=group_limited", "moe.num_experts=8", "moe.num_groups=4", "moe.top_groups=2",
        "moe.bias_update_rate=0.01", "moe.aux_loss_scope=global_batch", "moe.route_scale=2.5",
    ],
    "hash": ["moe.router=hash"],
}  # fmt: skip
# ranks, ep_size, micro batch; the global batch has 4 samples
TOPOLOGIES = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 4, 1), (4, 2, 1)]
OF_LOSSES = ("loss/lm", "loss/load_balancing", "loss/router_z", "optim/grad_norm", "eval/loss")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_rules_and_balancing_are_the_same_on_any_topology(small, short_samples, tmp_path, rule):
    arguments = [*small, *RULES[rule], "train.steps=6", "train.micro_batch_size=4"]
    whole = tmp_path / "whole"
    assert train.main([*arguments, f"run.dir={whole}"]) == 0
    topologies = TOPOLOGIES if rule in ("global loss", "biased groups") else TOPOLOGIES[:3:2]
    for ranks, ep_size, micro_batch in topologies:
        run = tmp_path / f"{ranks}-{ep_size}-{micro_batch}"
        changes = [f"parallel.ep_size={ep_size}", f"train.micro_batch_size={micro_batch}", f"run.dir={run}"]
        train_on_ranks(ranks, [*arguments, *changes])
        for line, expected in zip(read_lines(run), read_lines(whole), strict=True):
            for key in OF_LOSSES:
                assert line.get(key) == pytest.approx(expected.get(key), rel=TOLERANCE), (run, key)
        state, wanted = final_state(run), final_state(whole)
        assert state.keys() == wanted.keys()
        biases = [name for name in state if name.endswith("expert_bias")]
        assert len(biases) == (2 if "bias" in " ".join(RULES[rule]) else 0)
        for name in biases:
            assert torch.equal(state[name], wanted[name]), (run, name)
            assert state[name].abs().max() > 0.005


def test_a_bias_survives_resuming_at_another_ep_size(small, short_samples, tmp_path):
    arguments = [*small, *RULES["biased groups"]]
    whole, part = tmp_path / "whole", tmp_path / "part"
    train_on_ranks(2, [*arguments, "parallel.ep_size=2", f"run.dir={whole}"])
    shutil.copytree(whole, part)
    (part / "summary.json").unlink()
    shutil.rmtree(part / "checkpoints" / "step-00000012")
    assert train.main([*arguments, f"run.dir={part}"]) == 0
    for line, expected in zip(read_lines(part), read_lines(whole), strict=True):
        assert line.get("loss/lm") == pytest.approx(expected.get("loss/lm"), rel=TOLERANCE)
    state, wanted = final_state(part), final_state(whole)
    model = load_run(part, device="cpu").model
    for name in (f"blocks.{layer}.ffn.router.expert_bias" for layer in (0, 1)):
        assert torch.equal(state[f"weights/{name}"], wanted[f"weights/{name}"])
        assert torch.equal(model.get_buffer(name), wanted[f"weights/{name}"])
