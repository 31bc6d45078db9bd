"""The training loss against arithmetic written out here."""

import math

import pytest
import torch

from moe.config import Config, ModelConfig, MoEConfig
from moe.model.moe_layer import MoEAux
from moe.model.transformer import Transformer, TransformerOutput
from moe.training.loss import training_loss

# Two positions over three tokens, as probabilities; the targets are tokens 0 and 2.
PROBS = [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]
TARGETS = torch.tensor([[0, 2]])
CROSS_ENTROPY = -(math.log(0.5) + math.log(0.8)) / 2


def output(balance: list[float], z: list[float]) -> TransformerOutput:
    """Logits whose softmax is `PROBS`, shifted by another constant each, and a report of two layers."""
    logits = torch.tensor([PROBS]).log() + torch.tensor([[[3.0], [-7.0]]])
    counts = torch.tensor([[6, 0, 2, 0], [0, 1, 3, 0]])
    of_layers = torch.zeros(2, dtype=torch.int64)
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    of_each = counts, of_layers, torch.zeros(2), torch.zeros(2, 3), of_layers
    return TransformerOutput(logits, MoEAux(torch.tensor(balance), torch.tensor(z), probs, *of_each))


def test_two_layers_count_by_their_mean_and_each_loss_by_its_coefficient():
    moe = MoEConfig(aux_loss_coef=100.0, z_loss_coef=10.0)
    loss = training_loss(output(balance=[1.0, 3.0], z=[0.5, 4.5]), TARGETS, moe)
    assert loss.lm.item() == pytest.approx(CROSS_ENTROPY, rel=1e-6)
    assert loss.total.item() == pytest.approx(
        CROSS_ENTROPY + 100 * (1 + 3) / 2 + 10 * (0.5 + 4.5) / 2, rel=1e-6
    )


@pytest.mark.parametrize(("aux", "z", "added"), [(100.0, 0.0, 200.0), (0.0, 10.0, 25.0), (0.0, 0.0, 0.0)])
def test_a_coefficient_of_zero_leaves_its_loss_out(aux, z, added):
    moe = MoEConfig(aux_loss_coef=aux, z_loss_coef=z)
    loss = training_loss(output(balance=[1.0, 3.0], z=[0.5, 4.5]), TARGETS, moe)
    assert loss.total.item() == pytest.approx(CROSS_ENTROPY + added, rel=1e-6)


def test_of_a_dense_model_it_is_the_cross_entropy():
    loss = training_loss(TransformerOutput(output([0, 0], [0, 0]).logits, None), TARGETS, MoEConfig())
    assert loss.total.item() == loss.lm.item() == pytest.approx(CROSS_ENTROPY, rel=1e-6)
    assert loss.aux is None


def test_bf16_logits_are_averaged_in_fp32():
    """Over 8 positions of 1000 equally likely tokens: log 1000, which bf16 would round to 6.90625."""
    logits = torch.zeros(1, 8, 1000, dtype=torch.bfloat16)
    loss = training_loss(TransformerOutput(logits, None), torch.zeros(1, 8, dtype=torch.int64), MoEConfig())
    assert loss.lm.dtype == torch.float32
    assert loss.lm.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_the_gradient_of_the_total_reaches_logits_and_both_losses():
    logits = torch.tensor([PROBS]).log().requires_grad_()
    balance, z = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.5, 4.5], requires_grad=True)
    report = output([0, 0], [0, 0]).aux
    assert report is not None
    report = report._replace(load_balancing_loss=balance, router_z_loss=z)
    moe = MoEConfig(aux_loss_coef=100.0, z_loss_coef=10.0)
    training_loss(TransformerOutput(logits, report), TARGETS, moe).total.backward()
    # Of the cross-entropy: (probability - 1 at the target) over the two positions.
    expected = torch.tensor([[[-0.25, 0.125, 0.125], [0.05, 0.05, -0.1]]])
    torch.testing.assert_close(logits.grad, expected)
    assert balance.grad is not None
    assert z.grad is not None
    assert (balance.grad.tolist(), z.grad.tolist()) == ([50.0, 50.0], [5.0, 5.0])


def test_a_target_that_is_not_counted_is_left_out_of_the_mean_with_logits_and_without():
    """Of the two positions the second alone counts."""
    targets = torch.tensor([[-100, 2]])
    with_logits = output([1.0, 1.0], [0.0, 0.0])
    without = TransformerOutput(None, with_logits.aux, torch.tensor(-math.log(0.8)))
    for given in (with_logits, without):
        assert training_loss(given, targets, MoEConfig()).lm.item() == pytest.approx(-math.log(0.8), rel=1e-6)


@pytest.mark.parametrize(
    ("scope", "given", "expected"),
    [
        ("sequence", None, (1 + 3) / 2),  # as the layers report it
        # E sum f P: 4 (6/8 * 0.1 + 2/8 * 0.3) and 4 * 0.25
        ("micro_batch", None, (0.6 + 1) / 2),
        ("micro_batch", [[8, 0, 0, 0], [4, 0, 0, 0]], (0.6 + 1) / 2),
        ("global_batch", None, (0.6 + 1) / 2),
        # f is 2/16, 2/16, 2/16, 10/16 over the global batch: 4 (0.6 / 8 + 0.4 * 10 / 16)
        ("global_batch", [[2, 2, 2, 10], [4, 4, 4, 4]], (1.3 + 1) / 2),
    ],
)
def test_the_scope_of_the_load_balancing_loss_says_whose_counts_it_takes(scope, given, expected):
    counts = None if given is None else torch.tensor(given)
    moe = MoEConfig(aux_loss_coef=100.0, z_loss_coef=0.0, aux_loss_scope=scope)
    loss = training_loss(output(balance=[1.0, 3.0], z=[0.0, 0.0]), TARGETS, moe, counts)
    assert loss.total.item() == pytest.approx(CROSS_ENTROPY + 100 * expected, rel=1e-6)
    assert loss.aux is not None
    assert loss.aux.load_balancing_loss.mean().item() == pytest.approx(expected, rel=1e-6)


def test_wrong_targets_are_value_errors_in_words_with_logits_and_without():
    config = Config(model=ModelConfig(d_model=16, n_layers=1, n_heads=2, vocab_size=50))
    model, tokens = Transformer(config), torch.arange(12).view(2, 6)
    for targets, message in {
        tokens + 45: r"targets should be from 0 to 49, or -100; got 45 to 56",
        tokens - 1: r"targets should be from 0 to 49, or -100; got -1 to 10",
        tokens[:, 1:]: r"targets should be \(batch, sequence\) = \(2, 6\), got \(2, 5\)",
        tokens.float(): r"targets should be of int64, got torch.float32",
    }.items():
        with pytest.raises(ValueError, match=message):
            model(tokens, targets=targets)
        with pytest.raises(ValueError, match=message):
            training_loss(model(tokens), targets, config.moe)
