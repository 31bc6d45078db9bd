"""Two real ranks that split the experts: killed, hung, told to stop, out of samples, or misconfigured."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

import train
from moe.config import load_config
from moe.data.samples import num_samples
from moe.data.token_cache import prepare_corpus
from tests.support.launching import DEEPSPEED, TWO_RANKS, free_port, launched
from tests.support.paths import TINY, TRAIN
from tests.support.ranks import run_ranks, start_ranks
from tests.support.runs import assert_same_run, read_lines
from tests.support.training import Trained, train_each, train_on_ranks, train_once

STEPS = 60  # enough of them that a signal sent at the second arrives before the last
RESTARTS = 2
PATIENCE_S = 20  # from a rank's death to the end of the job, on a busy machine


@pytest.fixture(scope="module")
def arguments(small) -> list[str]:
    overrides = [f"train.steps={STEPS}", "train.eval_interval=30", "train.checkpoint_interval=20"]
    return [*small, *overrides, "parallel.ep_size=2"]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    train_on_ranks(2, [*arguments, f"run.dir={run}"])
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 8), (2, 20)])
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(arguments, tmp_path, ranks, kills):
    """At random moments, every other time while a checkpoint is written; started again each time."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    choice = random.Random(seed)
    split = f"parallel.ep_size={ranks}"
    arguments = [*arguments, split, f"train.steps={7 * kills}", "train.eval_interval=70"]
    run, torn = tmp_path / "killed", 0
    call = [*arguments, f"run.dir={run}"]
    for kill in range(kills):
        processes, _ = start_ranks(ranks, train_once, [*call, "train.checkpoint_interval=2"])
        target, in_write = last_logged_step(run) + choice.randint(1, 4), kill % 2 == 0
        deadline = time.monotonic() + 60
        while last_logged_step(run) < target or (in_write and not unfinished(run)):
            assert time.monotonic() < deadline, "training does not go on"
            time.sleep(0.001)
        time.sleep(choice.uniform(0, 0.01 if in_write else 0.05))
        processes[choice.randrange(ranks)].kill()
        time.sleep(choice.uniform(0, 0.5))  # then the launcher ends the survivor
        for process in processes:
            process.kill()
            process.join()
        saved = max(steps_of(run), default=0)
        # The next save waits for the one before, so that at most two are lost: one begun, and one not yet.
        assert last_logged_step(run) - saved <= 4, f"kill {kill}"
        torn += bool(unfinished(run))
    assert torn >= kills // 4, f"{torn} of {kills} kills left half a checkpoint"
    train_on_ranks(ranks, [*call, "train.checkpoint_interval=100"])
    whole = tmp_path / "whole"
    train_on_ranks(ranks, [*arguments, f"run.dir={whole}", "train.checkpoint_interval=100"])
    assert_same_run(run, whole)
    assert not unfinished(run)


@pytest.mark.slow
def test_torchrun_restarts_killed_ranks_and_they_resume_by_themselves(arguments, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    choice = random.Random(seed)
    arguments = [*arguments, f"train.steps={18 * RESTARTS}", "train.eval_interval=50"]
    launcher = [*TWO_RANKS, "--max-restarts", str(RESTARTS)]
    restarted_at = []
    with launched(
        launcher,
        [*arguments, "train.checkpoint_interval=2"],
        tmp_path / "killed",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1",  # the survivor need not say who is missing
    ) as job:
        for kill in range(RESTARTS):
            target = last_logged_step(job.run) + choice.randint(1, 12)
            in_write = kill % 2 == 0

            def ready(target=target, in_write=in_write):
                return last_logged_step(job.run) >= target and (not in_write or unfinished(job.run))

            job.wait_until(ready, "training goes on after a restart")
            time.sleep(choice.uniform(0, 0.01 if in_write else 0.05))
            ranks = job.ranks()
            ranks[choice.randrange(2)].send_signal(signal.SIGKILL)
            _, alive = psutil.wait_procs(list(ranks.values()), timeout=60)
            assert not alive, job.output()
            saved = max(steps_of(job.run), default=0)
            assert last_logged_step(job.run) - saved <= 4, f"kill {kill}"  # one begun, and one not yet
            restarted_at += [saved] if saved else []
        assert job.ended_within(120) == 0, job.output()
        assert [
            int(step) for step in re.findall(r"resumed from \S+/step-(\d+)", job.output())
        ] == restarted_at
    train_on_ranks(2, [*arguments, f"run.dir={tmp_path / 'whole'}"])
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert not unfinished(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dead"), [("torchrun", 1), ("deepspeed", 0)])
def test_a_killed_rank_ends_the_job_within_seconds_and_is_named_in_one_line(arguments, tmp_path, name, dead):
    """Rank 0 included, with which the store of DeepSpeed's launcher dies."""
    with launched(launcher_of(name), [*arguments, "train.steps=100000"], tmp_path / "run") as job:
        job.wait_until(lambda: last_logged_step(job.run) >= 25 and 20 in steps_of(job.run), "training")
        job.ranks()[dead].send_signal(signal.SIGKILL)
        assert job.ended_within(PATIENCE_S) not in (0, None), job.output()
    assert_names(job.output(), survivor=1 - dead, silent=dead)
    if name == "torchrun":
        assert re.search(rf"Root Cause.*\brank +: {dead} .*exitcode +: -9", job.output(), re.DOTALL)
    assert steps_of(job.run)


LESS_PATIENCE = """
# DeepSpeed's launcher waits 30 seconds for a rank that hangs before it kills it.
import psutil
wait = psutil.wait_procs
psutil.wait_procs = lambda processes, timeout=None, **more: wait(processes, timeout and timeout / 10, **more)
"""


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_when_the_timeout_is_over(arguments, tmp_path):
    """Rank 0, which under DeepSpeed's launcher keeps the store that the other would ask."""
    hung, timeout_s = 0, 6
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(LESS_PATIENCE)
    with launched(
        launcher_of("deepspeed"),
        [
            *arguments,
            "train.steps=100000",
            "train.checkpoint_interval=100000",
            f"parallel.timeout_s={timeout_s}",
        ],
        tmp_path / "run",
        PYTHONPATH=str(tmp_path / "site"),
    ) as job:
        job.wait_until(lambda: last_logged_step(job.run) >= 2, "training")
        ranks = job.ranks()
        stopped_at = time.monotonic()
        ranks[hung].send_signal(signal.SIGSTOP)
        ranks[1 - hung].wait(timeout_s + PATIENCE_S)
        assert timeout_s - 2 < time.monotonic() - stopped_at
        assert job.ended_within(60) not in (0, None), job.output()
        assert has_ended(ranks[hung])
    assert_names(job.output(), survivor=1 - hung, silent=hung)


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_at_one_step_and_loses_nothing(arguments, reference, tmp_path):
    with launched(TWO_RANKS, arguments, tmp_path / "run") as job:
        job.wait_until(lambda: last_logged_step(job.run) >= 2, "training")
        job.ranks()[1].send_signal(signal.SIGTERM)
        assert job.ended_within(PATIENCE_S) == 1, job.output()  # torchrun's code, whatever its processes'
    [step] = re.findall(r"stopped and saved at step (\d+) of", job.output())
    assert max(steps_of(job.run)) == int(step) == last_logged_step(job.run) < STEPS
    shards = {path.name for path in (job.run / "checkpoints" / f"step-{int(step):08d}").iterdir()}
    assert shards == {"00000-00000.safetensors", "00001-00000.safetensors", "manifest.json"}
    assert "error:" not in job.output()
    assert not (job.run / "summary.json").exists()
    assert f"/step-{int(step):08d}" in train_on_ranks(2, [*arguments, f"run.dir={job.run}"]).out
    assert_same_run(job.run, reference)


@pytest.mark.slow
def test_evaluation_counts_each_sample_once_where_a_rank_has_none_in_the_last_round(
    small, short_samples, tmp_path
):
    text = tmp_path / "text"
    text.write_text("".join(f"this is line {line:06d}\n" for line in range(180)))
    arguments = [*small, f"data.source={text}", "train.steps=2", "train.eval_batches=50"]
    corpus = prepare_corpus(load_config(TINY, arguments))
    assert num_samples(len(corpus.validation.tokens), 32) % 4 in (1, 2)  # of two ranks with two samples each
    train_on_ranks(2, [*arguments, "parallel.ep_size=2", f"run.dir={tmp_path / 'two'}"])
    assert train.main([*arguments, f"run.dir={tmp_path / 'one'}"]) == 0
    [loss], [expected] = (
        [line["eval/loss"] for line in read_lines(tmp_path / ranks) if "eval/loss" in line]
        for ranks in ("two", "one")
    )
    assert loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_both_ranks_pass_over_a_damaged_checkpoint_and_half_a_write(arguments, reference, tmp_path):
    shard = "00001-00000.safetensors"  # of rank 1; rank 0 finds it for both
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    (run / "summary.json").unlink()
    *_, newest = sorted((run / "checkpoints").glob("step-*"))
    shutil.copytree(newest, run / "checkpoints" / f".step-{STEPS + 20:08d}.partial")
    content = bytearray((newest / shard).read_bytes())
    content[-1] ^= 1
    (newest / shard).write_bytes(content)
    rank_0, rank_1 = run_ranks(2, train_once, [*arguments, f"run.dir={run}"])
    assert (rank_0.code, rank_1) == (0, Trained(0, "", "")), (rank_0, rank_1)
    assert rank_0.err.count("warning:") == 1
    assert f"{newest.name} is damaged ({shard} does not match its checksum)" in rank_0.err
    assert f"resumed from {run / 'checkpoints' / f'step-{STEPS - 20:08d}'}" in rank_0.out
    assert not unfinished(run)
    assert_same_run(run, reference)


IMPOSSIBLE = {
    "parallel.ep_size=3": "3 does not divide moe.num_experts (4)",
    "moe.num_experts=3": "2 does not divide moe.num_experts (3)",
    "parallel.ep_size=4": "4 does not divide the 2 ranks",
}


def test_an_impossible_split_of_experts_is_refused_by_every_rank_in_one_line(arguments, tmp_path):
    calls = [[*arguments, change, f"run.dir={tmp_path / 'run'}"] for change in IMPOSSIBLE]
    for of_rank in run_ranks(2, train_each, calls):
        for trained, expected in zip(of_rank, IMPOSSIBLE.values(), strict=True):
            assert (trained.code, trained.out, trained.err.count("\n")) == (2, "", 1), trained
            assert trained.err.startswith(f"error: parallel.ep_size: {expected}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_ends_when_the_split_of_experts_is_refused(arguments, tmp_path):
    with launched(TWO_RANKS, [*arguments, "parallel.ep_size=3"], tmp_path / "run") as job:
        assert job.ended_within(60) == 1, job.output()
    assert "error: parallel.ep_size: 3 does not divide" in job.output()
    assert f'File "{TRAIN}"' not in job.output()
    assert not job.run.exists()


def train_alone_of_two(rank, arguments):
    """As one of two ranks, of which the other one was never started."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return train_once(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_partner_never_comes_says_so_in_one_line(arguments, tmp_path, rank):
    call = [*arguments, "parallel.timeout_s=3", f"run.dir={tmp_path / 'run'}"]
    [trained] = run_ranks(1, train_alone_of_two, rank, call, timeout_s=60)
    assert trained.code == 1
    assert trained.err.startswith(f"error: rank {rank}: ")
    assert trained.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def has_ended(process: psutil.Process) -> bool:
    """Also where nobody reaps it, as in a container without an init."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def launcher_of(name: str) -> list[str]:
    return TWO_RANKS if name == "torchrun" else [*DEEPSPEED, "--num_gpus", "2", "--master_port", free_port()]


def assert_names(output: str, survivor: int, silent: int) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    who = f"no sign of life from rank {silent}"
    saved = r"(the checkpoint of step \d+ can be loaded|no checkpoint was saved yet)"
    assert re.fullmatch(rf"error: rank {survivor}: .+: {who}; {saved}", errors[0]), errors
    assert f'File "{TRAIN}"' not in output


def last_logged_step(run: Path) -> int:
    """0 before the first; a line that a killed run left unfinished does not count."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]


def unfinished(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".step-*.partial"))
