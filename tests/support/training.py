"""train.py without starting Python anew: in this process, as one of several ranks, or forked."""

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import IO, NamedTuple

import torch

import train
from moe.inference import sample_text
from moe.inference.generation import Sampling
from tests.support.paths import TRAIN
from tests.support.ranks import CONTEXT, run_ranks

_SHORT = Sampling(max_new_tokens=4)  # the text at the end takes longer than a short training


class Trained(NamedTuple):
    """Exit code and output of one rank."""

    code: int
    out: str
    err: str


def train_once(arguments: list[str]) -> Trained:
    """One run, with a few tokens of text at its end."""
    sample_text.SAMPLING = _SHORT
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = train.main(arguments)
    return Trained(code, out.getvalue(), err.getvalue())


def train_each(calls: list[list[str]]) -> list[Trained]:
    """One run after the other."""
    return [train_once(call) for call in calls]


def train_on_ranks(num_ranks: int, arguments: list[str]) -> Trained:
    """A run on so many ranks, each a process of its own: what rank 0 printed. It must end well on all."""
    ranks = run_ranks(num_ranks, train_once, arguments)
    for rank, trained in enumerate(ranks):
        assert trained.code == 0, (rank, trained)
    return ranks[0]


class ForkedTraining:
    """Takes the place of the `subprocess.Popen` of `python train.py ...`; it does not import torch again."""

    def __init__(
        self, command: list[str], stdout: IO[bytes], stderr: IO[bytes], env: Mapping[str, str]
    ) -> None:
        assert command[:2] == [sys.executable, str(TRAIN)], command
        assert stdout is stderr
        arguments = (command[2:], stdout.name, dict(env))
        self._process = CONTEXT.Process(target=_train_into_log, args=arguments, daemon=True)
        self._process.start()

    def wait(self) -> int | None:
        """Its exit code, when it has ended."""
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _train_into_log(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sample_text.SAMPLING = _SHORT
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = train.main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
