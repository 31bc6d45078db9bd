"""Experts split over several ranks: what a rank computes, what it sends, and how long it takes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.accounting.communication import bytes_per_value, estimate_communication, rows_per_token
from moe.benchmark.measuring import now, spread_ms
from moe.config import Config, ConfigError, RunError, changed, dump_config, load_config
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed.agreement import on_all_ranks
from moe.distributed.groups import World
from moe.distributed.launch import leave
from moe.model.moe_layer import MoEAux, MoELayer
from moe.training.engine import start


def split_configs(config: Config, ranks: Sequence[int]) -> list[Config]:
    """The configuration for each number of ranks, which split the experts and the global batch evenly.

    Raises:
        ConfigError: it is dense, drops tokens, or does not split evenly.
    """
    if config.moe.is_dense:
        raise ConfigError("moe.num_experts", "1 is a dense model; there is nothing to dispatch")
    if config.moe.capacity_factor is not None:
        raise ConfigError("moe.capacity_factor", "rows are counted without dropping; set it to null")
    found = []
    for number in ranks:
        if config.moe.num_experts % number or config.train.global_batch_size % number:
            sizes = f"{config.moe.num_experts} experts and {config.train.global_batch_size} sequences"
            raise ConfigError("--ranks", f"{number} ranks cannot share {sizes} evenly; leave it out")
        share = config.train.global_batch_size // number
        found.append(changed(config, {"parallel.ep_size": number, "train.micro_batch_size": share}))
    return found


def measure_dispatch(config: Config, repeats: int) -> dict[str, Any]:
    """Run one MoE layer, forward and backward, on `parallel.ep_size` ranks of one thread each.

    Args:
        config: one of `split_configs`.
        repeats: timed passes, after one that is not timed.

    Returns:
        A record with what is expected by the formulas of `accounting`, and what was counted.

    Raises:
        RunError: the ranks failed.
    """
    ranks, model, moe = config.parallel.ep_size, config.model, config.moe
    counted = _launch(config, repeats)
    seconds = np.array([rank["seconds"] for rank in counted]).max(axis=0)  # of the slowest rank
    rows = [rank["rows"] for rank in counted]
    tokens = config.train.micro_batch_size * config.data.seq_len
    sent = tokens * rows_per_token(config) * (1 - 1 / ranks) * model.d_model * bytes_per_value(config)
    ms = spread_ms(seconds.tolist())
    return {
        "ranks": ranks,
        "experts_per_rank": moe.num_experts // ranks,
        "tokens_per_rank": tokens,
        "rows_per_rank": rows,
        "routed_flops_per_rank": [3 * 2 * 3 * model.d_model * moe.d_ff_expert * number for number in rows],
        "dispatch_bytes_per_rank": [rank["dispatch_bytes"] for rank in counted],
        "expected_dispatch_bytes": sent,
        "expected_step_bytes": estimate_communication(config, ranks).all_to_all,
        "layer_ms": ms.median,
        "layer_quartiles_ms": ms.quartiles,
        "repeats": repeats,
    }


def measure_rank(config: Config, repeats: int) -> list[dict[str, Any]]:
    """Run the layer on this rank, on its share of the global batch; all ranks call this.

    Returns:
        Of each rank: the rows that its experts computed, the bytes of rows that it sent to other ranks in one
        forward pass, and the seconds of each pass.
    """
    world = start(config.parallel)
    dispatcher, device = choose_dispatcher(world.groups, config.parallel), world.device
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    layer = MoELayer(config.model.d_model, config.moe, dispatcher, seed=0).to(device, dtype)
    hidden, upstream = (_share(config, world, seed).to(device, dtype) for seed in (0, 1))
    hidden.requires_grad_()

    def one_pass() -> tuple[float, MoEAux]:
        hidden.grad = None
        layer.zero_grad(set_to_none=True)
        on_all_ranks(lambda: None)  # start together
        started = now(device)
        output, aux = layer(hidden)
        output.backward(upstream)
        return now(device) - started, aux

    passes = [one_pass() for _ in range(1 + repeats)]
    aux = passes[0][1]
    chosen = np.array(on_all_ranks(aux.tokens_per_expert.tolist)).sum(axis=0)
    found = {
        "rows": int(chosen[list(dispatcher.expert_ids(config.moe.num_experts))].sum()),
        "dispatch_bytes": int(aux.dispatch_bytes),
        "seconds": [seconds for seconds, _ in passes[1:]],
    }
    return on_all_ranks(lambda: found)


def _share(config: Config, world: World, seed: int) -> Tensor:
    """This rank's part (B, S, D) of a random global batch, the same on any number of ranks."""
    size, sequences = config.train.micro_batch_size, config.train.global_batch_size
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(sequences, config.data.seq_len, config.model.d_model, generator=generator)
    return batch[world.rank * size : (world.rank + 1) * size].clone()


def _launch(config: Config, repeats: int) -> list[dict[str, Any]]:
    """`measure_rank` on ranks of their own."""
    ranks = config.parallel.ep_size
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(dump_config(config))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(torchrun if ranks > 1 else []), "-m", __name__, scratch, str(repeats)]
        with (folder / "log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if code:
            raise RunError(f"the layer on {ranks} ranks failed:\n" + (folder / "log").read_text()[-3000:])
        return json.loads((folder / "ranks.json").read_text())


def _work(folder: Path, repeats: int) -> None:
    """One rank of `_launch`."""
    found = measure_rank(load_config(folder / "config.yaml"), repeats)
    if os.environ.get("RANK", "0") == "0":
        (folder / "ranks.json").write_text(json.dumps(found))
    leave()
    os._exit(0)  # an interpreter that ends in order is at times aborted by a thread of gloo


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
