"""Runs that were stopped, damaged, finished or poisoned, and go on."""

import json
import math
import signal
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch

import train
from moe.config import changed, load_config
from moe.data.tokenizer import load_tokenizer
from moe.runs.resuming import with_recorded_revisions
from moe.runs.run_folder import RunFolder
from moe.training.engine import Engine
from moe.training.loss import training_loss
from moe.training.stop_request import StopRequest
from tests.support.runs import assert_same_run, final_state, read_lines


def test_resuming_twice_in_a_row_is_bit_exact(run_main):
    """The learning rates and the sample order of an interrupted run are those of the whole one."""
    _, whole, _, _ = run_main(folder="whole")
    real_step = Engine.step
    for stop_after in (4, 8):
        calls = []

        def step_then_interrupt(self, lr, calls=calls):
            calls.append(lr)
            if len(calls) == 2 * 4:  # two micro batches a step; the second time it starts at step 4
                signal.raise_signal(signal.SIGINT)
            return real_step(self, lr)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "step", step_then_interrupt)
            code, run, out, _ = run_main(folder="interrupted")
        assert code == 130
        assert f"stopped and saved at step {stop_after} of 12" in out
        assert not (run / "summary.json").exists()
    code, run, out, _ = run_main(folder="interrupted")
    assert code == 0
    assert "resumed from" in out
    assert_same_run(run, whole)


@pytest.mark.parametrize("micro_batch", [1, 17])
def test_an_interrupted_run_says_what_of_it_is_saved(run_main, monkeypatch, micro_batch):
    """A checkpoint is saved every 4 steps, each of two micro batches; that of step 8 may be under way."""
    losses = []

    def interrupt(*arguments):
        losses.append(arguments)
        if len(losses) == micro_batch:
            raise KeyboardInterrupt
        return training_loss(*arguments)

    monkeypatch.setattr(train, "training_loss", interrupt)
    code, run, _, error = run_main()
    steps = [int(path.name[5:]) for path in run.glob("checkpoints/step-*")]
    assert bool(steps) == (micro_batch > 1)
    saved = f"the checkpoint of step {max(steps)} can be loaded" if steps else "no checkpoint was saved yet"
    assert (code, error.splitlines()[-1]) == (130, f"interrupted; {saved}")


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


def test_a_finished_run_is_left_alone_and_can_be_prolonged(run_main):
    _, run, _, _ = run_main()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, _, out, _ = run_main()
    assert code == 0
    assert "is finished; raise train.steps" in out
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


def test_a_run_resumes_from_its_own_config_file(run_main, tmp_path):
    _, run, _, _ = run_main("train.steps=8")
    assert train.main([str(run / "config.yaml"), "train.steps=12"]) == 0
    assert read_lines(run)[-1]["step"] == 12


def test_a_run_continues_with_the_commits_of_hub_data_that_it_began_with(run_main, tmp_path, monkeypatch):
    """The hub is out of reach: `datasets` serves a local file, the tokenizer is in the cache of the hub."""
    newest, loaded = ["first"], []
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps({"text": f"poem {i} of words " * 9}) + "\n" for i in range(200)))
    tokenizer = tmp_path / "snapshots" / "abc" / "tokenizer.json"
    tokenizer.parent.mkdir(parents=True)
    load_tokenizer("bytes", ()).save(str(tokenizer))

    class Hub:
        def dataset_info(self, name, timeout):
            return SimpleNamespace(sha=newest[0])

    def load(path, name, split, streaming, revision):
        loaded.append(revision)
        return real_load("json", data_files=str(records), split="train", streaming=True)

    real_load = datasets.load_dataset
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tokenizer))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub_data = ["data.source=someone/poems", "data.tokenizer=someone/tokenizer"]
    code, run, _, _ = run_main(*hub_data, "train.steps=4")
    assert code == 0
    saved = load_config(run / "config.yaml").data
    assert (saved.revision, saved.tokenizer_revision) == ("first", "abc")
    newest[0] = "second"
    code, run, out, _ = run_main(*hub_data, "train.steps=8", f"data.cache_dir={tmp_path / 'other'}")
    assert code == 0
    assert "resumed from" in out
    assert set(loaded) == {"first"}
    assert load_config(run / "config.yaml").data.revision == "first"
    code, _, _, err = run_main(*hub_data, "train.steps=12", "data.revision=second")
    assert code == 2
    assert "the text or its tokens changed" in err
    # What another source or tokenizer is read at does not follow from this run.
    resumed = changed(
        load_config(run / "config.yaml"), {"data.revision": None, "data.tokenizer_revision": None}
    )
    other = changed(resumed, {"data.source": "someone/novels"})
    assert with_recorded_revisions(resumed, RunFolder(run)).data.revision == "first"
    assert with_recorded_revisions(other, RunFolder(run)).data.revision is None
    assert with_recorded_revisions(other, RunFolder(run)).data.tokenizer_revision == "abc"


def test_a_prolonged_run_does_not_keep_the_old_results_while_it_runs(run_main, monkeypatch):
    _, run, _, _ = run_main("train.steps=4")
    assert (run / "summary.json").exists()
    real_step = Engine.step
    monkeypatch.setattr(
        Engine, "step", lambda self, lr: (signal.raise_signal(signal.SIGINT), real_step(self, lr))[1]
    )
    monkeypatch.setattr(StopRequest, "_ask", lambda self, *_: setattr(self, "made", True))
    assert run_main("train.steps=8")[0] == 130
    assert not (run / "summary.json").exists()


@pytest.fixture
def bad_batch(monkeypatch):
    """Multiply the loss of each micro batch of some steps, and interrupt the run in another one."""

    def poison(*bad: int, interrupted: int = 0, factor: float = math.inf) -> None:
        real, steps = train.train_step, []

        def recorded(run, engine, step):
            steps.append(step + 1)
            if steps[-1] == interrupted:
                signal.raise_signal(signal.SIGINT)
            return real(run, engine, step)

        def poisoned(output, *others):
            loss = training_loss(output, *others)
            return loss._replace(total=loss.total * factor) if steps[-1] in bad else loss

        monkeypatch.setattr(train, "train_step", recorded)
        monkeypatch.setattr(train, "training_loss", poisoned)

    return poison


def test_an_update_whose_gradient_is_not_finite_is_skipped_as_if_its_step_were_left_out(run_main, bad_batch):
    """Weights and moments are those of the run without the step, bit for bit; after a resume too."""
    code, left_out, _, error = run_main("train.skip_steps=[3,7]", folder="left out")
    assert (code, error) == (0, "")
    bad_batch(3, 7, interrupted=5)
    assert run_main()[0] == 130
    bad_batch(3, 7)
    code, run, _, error = run_main()
    assert code == 0
    assert error == "warning: step 7: update skipped, as its gradient norm is nan\n"
    assert_same_run(run, left_out)
    skipped = {line["step"]: line["optim/skipped_steps"] for line in read_lines(run) if "loss/lm" in line}
    assert skipped == {1: 0, 2: 0, 4: 1, 5: 1, 6: 1, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2}


def test_a_spike_is_known_by_the_norms_from_before_a_resume(run_main, bad_batch):
    """Stopped at step 20; 9 norms later there is one of 1,000 times the others, and 16 are needed to tell."""
    spikes = ["train.steps=32", "optim.skip_norm_above=50", "train.checkpoint_interval=20"]
    code, left_out, _, _ = run_main("train.skip_steps=[30]", *spikes, folder="left out")
    assert code == 0
    bad_batch(30, interrupted=20, factor=1000.0)
    assert run_main(*spikes)[0] == 130
    bad_batch(30, factor=1000.0)
    code, run, _, error = run_main(*spikes)
    assert code == 0
    assert error.startswith("warning: step 30: update skipped, as its gradient norm is ")
    assert read_lines(run)[-2]["optim/skipped_steps"] == 1
    assert_same_run(run, left_out)


def test_too_many_skipped_updates_in_a_row_end_the_run_and_reach_no_checkpoint(run_main, bad_batch):
    bad_batch(7, 9, 10, 11)
    code, run, _, error = run_main("optim.max_skips=2")
    assert code == 1
    *warnings, last = error.splitlines()
    assert [line.split(": ")[1] for line in warnings] == ["step 7", "step 9", "step 10"]
    assert last.startswith("error: step 11: 3 updates in a row were skipped; ")
    assert (run / "failure.txt").read_text().startswith("step 11: ")
    assert all(torch.isfinite(tensor).all() for tensor in final_state(run).values())
    assert run_main("optim.max_skips=2", "train.skip_steps=[9,10,11]")[0] == 0


def test_with_a_capacity_the_micro_batch_stays_on_resume(run_main):
    assert run_main("train.steps=4", "moe.capacity_factor=1.0")[0] == 0
    code, _, _, error = run_main("moe.capacity_factor=1.0", "train.micro_batch_size=1")
    assert code == 2
    assert error.startswith("error: train.micro_batch_size: differs from the run in ")


def test_a_key_that_the_model_does_not_use_may_change_on_resume(run_main):
    """All layers are sparse, so no block has the width `model.d_ff`; a dense model has no router."""
    assert run_main("train.steps=4")[0] == 0
    code, run, _, _ = run_main("train.steps=8", "model.d_ff=72")
    assert (code, read_lines(run)[-1]["step"]) == (0, 8)
    dense = ["moe.num_experts=1", "moe.top_k=1"]
    assert run_main("train.steps=4", *dense, folder="dense")[0] == 0
    assert run_main("train.steps=8", *dense, "moe.aux_loss_coef=0.5", folder="dense")[0] == 0
    code, _, _, error = run_main("train.steps=8", "moe.aux_loss_coef=0.5")
    assert code == 2
    assert error.startswith("error: moe.aux_loss_coef: differs from the run in ")
