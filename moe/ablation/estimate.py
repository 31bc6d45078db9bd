"""The plan of an ablation as a table, with an estimate of its time on a CPU."""

import math
import time
from collections.abc import Iterator, Sequence

import torch

from moe.ablation.cells import Cell
from moe.accounting.counts import count_parameters
from moe.accounting.memory import estimate_memory
from moe.config import Config
from moe.model.transformer import Transformer
from moe.tables import gib, plain

UPDATE_SECONDS = 7e-9  # of ZeRO's update per parameter, measured on a 33.5M model
LARGEST = 50e6  # parameters, of a model whose forward and backward pass is timed


def seconds_per_run(cells: Sequence[Cell], config: Config) -> list[float] | None:
    """Seconds that a run of each cell takes on one thread of this CPU; None where the model is too large."""
    counts = count_parameters(config)
    if counts.total > LARGEST:
        return None
    batch = config.train.global_batch_size * config.data.seq_len
    per_flop = _seconds_of_a_pass(config) / (
        config.train.micro_batch_size * config.data.seq_len * counts.flops_per_token_train
    )
    return [
        config.train.steps
        * (batch * cell.counts.flops_per_token_train * per_flop + UPDATE_SECONDS * cell.counts.total)
        for cell in cells
    ]


def _seconds_of_a_pass(config: Config) -> float:
    """The fastest of a few forward and backward passes over one micro batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (config.train.micro_batch_size, config.data.seq_len))
    fastest = math.inf
    for _ in range(4):  # the first pass loads libraries
        started = time.perf_counter()
        model(tokens).logits.float().logsumexp(2).mean().backward()
        fastest = min(fastest, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return fastest


def plan_table(cells: Sequence[Cell], device: str, seconds: Sequence[float] | None) -> Iterator[list[str]]:
    """A row per cell, after two rows of headings."""
    yield ["", "", "", "expert", "parameters", "parameters", "FLOPs", "off", "memory", "FLOPs", "seconds"]
    ranks = max(cell.config.parallel.ep_size for cell in cells)
    yield ["cell", "experts", "top_k", "width", "total", "active", "a token", "by", "", "a run", "a run"]
    for cell, time_of_run in zip(cells, seconds or [None] * len(cells), strict=True):
        config, counts, moe = cell.config, cell.counts, cell.config.moe
        tokens = config.train.steps * config.train.global_batch_size * config.data.seq_len
        yield [
            cell.name,
            *(str(moe.num_experts), str(moe.top_k), str(moe.d_ff_expert)),
            *(f"{counts.total:,}", f"{counts.active_all:,}", f"{counts.flops_per_token_train:,}"),
            f"{cell.mismatch:+.2%}",
            gib(estimate_memory(config, ranks, device).peak),
            f"{tokens * counts.flops_per_token_train:.2e}",
            "" if time_of_run is None else plain(time_of_run),
        ]
