"""Real launches: every way to start two ranks trains the same run, to the bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.launching import DEEPSPEED, TORCHRUN, free_port, stopped_at_the_end
from tests.support.paths import ROOT, TRAIN
from tests.support.runs import assert_same_run
from tests.support.training import train_on_ranks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launchers")]  # its reference is made once
STEPS = 40  # enough of them that a signal sent at the second arrives before the last

SRUN = """#!{python}
# As srun does: one task per node, the highest of their exit codes as its own, and SIGTERM kills them.
import os, signal, subprocess, sys

while sys.argv[1].startswith("--"):
    del sys.argv[1]
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | {{"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)}})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
[ "$1 $2" = "show hostnames" ] && echo "$3" | tr , '\\n'
"""


@pytest.fixture(scope="module")
def arguments(small) -> list[str]:
    return [*small, f"train.steps={STEPS}", "train.eval_interval=20", "train.checkpoint_interval=20"]


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory) -> Path:
    """The same run without a launcher."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train_on_ranks(2, [*arguments, f"run.dir={run}"])
    return run


def test_the_deepspeed_launcher_trains_the_same_run(arguments, reference, tmp_path):
    launcher = [*DEEPSPEED, "--num_gpus", "2", "--master_port", free_port()]
    finish(launch(launcher, arguments, tmp_path / "run"))
    assert_same_run(tmp_path / "run", reference)


def test_deepspeed_with_a_hostfile_and_two_hosts_trains_the_same_run(arguments, reference, tmp_path):
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    launcher = [*DEEPSPEED, "--hostfile", str(tmp_path / "hosts"), "--no_ssh"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", free_port(), "--node_rank"]
    finish(*(launch([*launcher, node], arguments, tmp_path / "run") for node in ("0", "1")))
    assert_same_run(tmp_path / "run", reference)


def test_two_nodes_each_with_a_network_of_its_own_train_the_same_run(arguments, reference, tmp_path):
    """In network namespaces joined by a cable, where this user can make them; else both on the loopback."""
    with two_networks() as (networks, address):
        launcher = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1"]
        launcher += ["--master-addr", address, "--master-port", free_port(), "--node-rank"]
        nodes = [[*network, *launcher, str(node)] for node, network in enumerate(networks)]
        finish(*(launch(node, arguments, tmp_path / "run") for node in nodes))
    assert_same_run(tmp_path / "run", reference)


def test_a_slurm_job_that_is_told_to_end_saves_and_continues_when_resubmitted(arguments, reference, tmp_path):
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    port = free_port()
    environment = {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(int(port) + 15_000),  # from which the script makes the port again
        "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.1",
        "SLURM_JOB_NUM_NODES": "2",
        "PROCESSES_PER_NODE": "1",
    }
    command = [str(ROOT / "scripts" / "slurm.sh"), *arguments, f"run.dir={tmp_path / 'run'}"]
    first = start(command, environment)
    with stopped_at_the_end(first):
        assert first.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("step 2/"):
            lines.append(first.stdout.readline())
            assert lines[-1], "".join(lines)  # it ended
        [srun] = psutil.Process(first.pid).children()
        # Whom Slurm signals when it ends a job: the tasks, not their children, and the shell, not srun.
        for process in (*srun.children(), first):
            process.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=60)
    assert first.returncode == 1, out  # torchrun's code, whatever that of its processes
    assert "stopped and saved at step" in out
    assert not (tmp_path / "run" / "summary.json").exists()

    second = finish(start(command, environment | {"MASTER_PORT": free_port()}))
    assert "resumed from" in second
    assert_same_run(tmp_path / "run", reference)


def launch(launcher: list[str], arguments: list[str], run: Path) -> subprocess.Popen[str]:
    return start([*launcher, str(TRAIN), *arguments, f"run.dir={run}"], {})


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start it with its output and errors in one pipe, and on one thread, as sums depend on their number."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> str:
    """Wait for the launchers of all nodes, and return what the first one printed."""
    outputs = []
    with stopped_at_the_end(*processes):
        for process in processes:
            try:
                outputs.append(process.communicate(timeout=120)[0])
            except subprocess.TimeoutExpired:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.send_signal(signal.SIGABRT)  # each prints where its threads are
                pytest.fail(process.communicate(timeout=20)[0])
            assert process.returncode == 0, outputs[-1]
    return outputs[0]


@contextmanager
def two_networks() -> Iterator[tuple[list[list[str]], str]]:
    """Commands that run a program in one network and in another, and the address of the first."""
    names = [f"gatework-{os.getpid()}-{node}" for node in range(2)]
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            cable = ["type", "veth", "peer", "name", "cable", "netns", names[1]]
            ip("link", "add", "cable", "netns", names[0], *cable)
            for node, name in enumerate(names):
                ip("-n", name, "address", "add", f"10.0.0.{node + 1}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError):
            yield [[], []], "127.0.0.1"
        else:
            # Left alone, gloo listens at the address of the host's name, which may be the loopback's.
            setting = ["env", "GLOO_SOCKET_IFNAME=cable"]
            yield [["ip", "netns", "exec", name, *setting] for name in names], "10.0.0.1"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
