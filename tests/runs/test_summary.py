"""summary.json: what of the logged lines is in it."""

from moe.accounting.counts import count_parameters
from moe.config import parse_config
from moe.runs.summary import overfitting, summarize


def test_the_final_losses_are_the_last_ones_not_the_best():
    config = parse_config({"model": {"vocab_size": 300}})
    lines = [
        {"step": 10, "tokens": 640, "loss/lm": 3.0, "perf/step_s": 0.5},
        {"step": 10, "tokens": 640, "eval/loss": 3.5, "eval/bits_per_byte": 2.5},
        {"step": 20, "tokens": 1280, "loss/lm": 2.0, "perf/step_s": 1.5},
        {"step": 20, "tokens": 1280, "eval/loss": 4.5, "eval/bits_per_byte": 3.25},
    ]
    spent = {"wall_s": 30.0, "device_s": 60.0}
    summary = summarize(config, count_parameters(config), lines, spent, None)
    assert summary["final_train_loss"] == 2.0
    assert summary["final_eval_loss"] == 4.5
    assert summary["final_bits_per_byte"] == 3.25
    assert summary["tokens"] == 1280
    assert summary["wall_s"] == 30.0
    assert summary["tokens_per_s"] == 64.0  # tokens a step over the mean of its seconds
    assert summary["cost"]["device_hours"] == 60 / 3600


def curve(train, validation):
    lines = []
    for step, (loss, held_out) in enumerate(zip(train, validation, strict=True), 1):
        lines += [{"step": step * 10, "loss/lm": loss}, {"step": step * 10, "eval/loss": held_out}]
    return lines


def test_a_validation_loss_that_rises_while_the_training_loss_falls_is_named():
    warning = overfitting(curve([5.0, 3.0, 1.0, 0.5], [5.0, 3.5, 3.75, 4.25]))
    assert warning is not None
    assert warning.startswith("the validation loss was lowest at step 20 (3.5000) and rose to 4.2500 ")


def test_other_curves_are_no_overfitting():
    assert overfitting(curve([5.0, 3.0, 1.0], [5.0, 3.5, 3.4])) is None
    assert overfitting(curve([5.0, 3.0, 2.0], [5.0, 3.5, 3.505])) is None  # noise
    assert overfitting(curve([5.0, 3.0, 6.0], [5.0, 3.5, 6.5])) is None  # both rise: it diverged
