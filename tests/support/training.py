"""train.py in this process, as one rank of several or alone."""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

import train
from moe.inference import sample_text
from moe.inference.generation import Sampling
from tests.support.ranks import run_ranks


class Trained(NamedTuple):
    """Exit code and output of one rank."""

    code: int
    out: str
    err: str


def train_once(arguments: list[str]) -> Trained:
    """Train to the end, with a few tokens of text there, which would take longer than the training."""
    sample_text.SAMPLING = Sampling(max_new_tokens=4)
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
