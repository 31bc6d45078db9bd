"""Whole runs on several sources, with document masks: one and the same run however it is divided."""

import json
import signal

import pytest

from moe.config import load_config
from moe.training.engine import Engine
from tests.support.runs import assert_same_run, read_lines
from tests.support.training import train_on_ranks


@pytest.fixture
def mixed(small, tmp_path, text_file):
    """Overrides of a run on three sources of short documents, whose weights change after 7 of 12 steps."""
    text, sources = text_file.read_text(), []
    for number, (name, weight) in enumerate({"a": 5, "b": 3, "c": 2}.items()):
        records = [
            text[at : at + 37 + at % 90] for at in range(number * 60_000, number * 60_000 + 50_000, 100)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"body": record}) for record in records))
        sources += [f"data.sources.{name}.source={path}", f"data.sources.{name}.weight={weight}"]
    masks = ["data.text_field=body", "data.document_masks=true", "data.source=stdlib"]
    annealing = ["data.anneal_step=7", "data.sources.c.anneal_weight=30", "data.sources.a.anneal_weight=0"]
    return [*small, *sources, *masks, *annealing]


@pytest.mark.slow
def test_a_run_on_several_sources_is_the_same_whatever_divides_it(mixed, run_main, tmp_path):
    code, whole, _, _ = run_main(*mixed, folder="whole")
    assert code == 0
    evaluations = [line for line in read_lines(whole) if "eval/loss" in line]
    assert all({f"eval/{name}/loss" for name in "abc"} <= line.keys() for line in evaluations)
    _, micro, _, _ = run_main(*mixed, "train.micro_batch_size=4", folder="micro")
    _, recomputed, _, _ = run_main(*mixed, "train.activation_checkpointing=true", folder="recomputed")
    train_on_ranks(2, [*mixed, f"run.dir={tmp_path / 'ranks'}", "parallel.ep_size=2"])
    for other in (micro, recomputed, tmp_path / "ranks"):
        for line, wanted in zip(read_lines(other), read_lines(whole), strict=True):
            for key in {"loss/lm", "eval/loss", "eval/a/loss", "eval/c/loss"} & wanted.keys():
                assert line[key] == pytest.approx(wanted[key], rel=1e-5), (other.name, key)


def test_a_run_that_is_interrupted_goes_on_with_the_samples_of_the_whole_one(mixed, run_main):
    """It is interrupted with the old weights, and again with the new ones."""
    _, whole, _, _ = run_main(*mixed, folder="whole")
    real_step = Engine.step
    for stop_after in (4, 8):
        calls = []

        def step_then_interrupt(self, lr, calls=calls):
            calls.append(lr)
            if len(calls) == 2 * 4:  # two micro batches a step
                signal.raise_signal(signal.SIGINT)
            return real_step(self, lr)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "step", step_then_interrupt)
            code, run, out, _ = run_main(*mixed, folder="interrupted")
        assert code == 130
        assert f"stopped and saved at step {stop_after} of 12" in out
    code, run, _, _ = run_main(*mixed, folder="interrupted")
    assert code == 0
    assert_same_run(run, whole)


def test_weights_are_refused_on_resume_and_masks_too(mixed, run_main):
    assert run_main(*mixed, "train.steps=4", "data.anneal_step=2")[0] == 0
    for change in ("data.sources.a.weight=6", "data.document_masks=false"):
        code, _, _, err = run_main(*mixed, "data.anneal_step=2", change)
        assert code == 2
        assert err.startswith(f"error: {'data.sources' if 'sources' in change else 'data.document_masks'}")


def test_a_run_names_its_sources_on_the_screen_and_in_its_configuration(mixed, run_main):
    _, run, out, _ = run_main(*mixed, "train.steps=4", "data.anneal_step=2")
    *_, last = [line for line in read_lines(run) if "eval/loss" in line]
    each = "; ".join(f"{name} {last[f'eval/{name}/loss']:.4f}" for name in "abc")
    assert f"step 4/4: validation loss {last['eval/loss']:.4f} nats per token" in out
    assert f" bits per byte; {each}\n" in out
    saved = load_config(run / "config.yaml").data
    assert [source.weight for source in saved.sources.values()] == [5, 3, 2]
    assert saved.weights_at(2) == {"a": 0, "b": 3, "c": 30}
