"""The plan of an ablation as a table, and its estimated time on a CPU."""

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

UPDATE_SECONDS = 1.5e-9  # of the update per parameter on one thread, measured with 4M to 15M parameters
START_SECONDS = 9  # of a run beside another one: loading PyTorch and DeepSpeed, opening text, the summary
LARGEST = 50e6  # most parameters of a model whose forward and backward pass is timed


def seconds_per_run(cells: Sequence[Cell], config: Config) -> list[float] | None:
    """Seconds of training and evaluation per run of each cell, on one thread of this CPU.

    None if the reference `config` is too large.
    """
    counts = count_parameters(config)
    if counts.total > LARGEST:
        return None
    micro_batch = config.train.micro_batch_size * config.data.seq_len
    per_flop = _seconds_per_micro_batch(config) / (micro_batch * counts.flops_per_token_train)
    train, data = config.train, config.data
    texts = 1 + len(data.sources) + len(data.extra_validation)
    evaluated = math.ceil(train.steps / train.eval_interval) * train.eval_batches * texts
    batches = train.steps + evaluated / 3  # they have no backward pass
    seconds_per_flop = per_flop * batches * train.global_batch_size * data.seq_len
    sizes = [(cell.counts.flops_per_token_train, cell.counts.total) for cell in cells]
    return [flops * seconds_per_flop + UPDATE_SECONDS * total * train.steps for flops, total in sizes]


def _seconds_per_micro_batch(config: Config) -> float:
    """The fastest of a few forward and backward passes on one thread, in time of the processor.

    So what else runs on the machine at the moment matters little.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = Transformer(config)
    tokens = torch.randint(0, config.vocab_size, (config.train.micro_batch_size, config.data.seq_len))
    seconds = []
    for _ in range(4):  # the first pass loads libraries
        started = time.process_time()
        model(tokens).logits.float().logsumexp(2).mean().backward()
        seconds.append(time.process_time() - started)
    torch.set_num_threads(threads)
    return min(seconds)


def plan_table(cells: Sequence[Cell], device: str, seconds: Sequence[float] | None) -> Iterator[list[str]]:
    """Two rows of headings, then one row per cell."""
    yield ["", "", "", "expert", "parameters", "parameters", "FLOPs", "off", "memory", "FLOPs", "seconds"]
    yield ["cell", "experts", "top_k", "width", "total", "active", "a token", "by", "", "a run", "a run"]
    ranks = max(cell.config.parallel.ep_size for cell in cells)
    for cell, time_of_run in zip(cells, seconds or [None] * len(cells), strict=True):
        config, counts, moe = cell.config, cell.counts, cell.config.moe
        yield [
            cell.name,
            *map(str, (moe.num_experts, moe.top_k, moe.d_ff_expert)),
            *(f"{count:,}" for count in (counts.total, counts.active_all, counts.flops_per_token_train)),
            f"{cell.mismatch:+.2%}",
            gib(estimate_memory(config, ranks, device).peak),
            f"{cell.tokens * counts.flops_per_token_train:.2e}",
            "" if time_of_run is None else plain(time_of_run),
        ]
