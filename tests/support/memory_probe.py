"""Measure, as one rank, how resident memory grows over the start and three steps of each configuration.

The parent sets MALLOC_MMAP_THRESHOLD_, so that glibc returns memory as soon as it is freed and the peak is
that of what is alive.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from moe.accounting.memory import estimate_memory
from moe.config import Config, load_config
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed.groups import World
from moe.model.transformer import Transformer
from moe.training.engine import Engine, start
from moe.training.loss import training_loss
from tests.support.paths import TINY

COMMON = ["model.vocab_size=1024", "parallel.keep_freed_memory=false"]


def resident(field: str) -> int:
    """Bytes of `VmRSS`, now, or `VmHWM`, at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def three_steps(config: Config, world: World) -> None:
    """From building the model to the third step on random tokens, as train.py does it, and nothing else."""
    torch.manual_seed(world.rank)
    with torch.device("meta"):
        model = Transformer(config, choose_dispatcher(world.groups, config.parallel))
    engine = Engine(model, config, world)
    engine.training_state.initialize(config.run.seed)
    for _step in range(3):
        for _micro in range(config.accumulation_steps(world.size)):
            shape = (config.train.micro_batch_size, config.data.seq_len + 1)
            tokens = torch.randint(0, config.vocab_size, shape)
            loss = training_loss(engine(tokens[:, :-1], targets=tokens[:, 1:]), tokens[:, 1:], config.moe)
            engine.backward(loss.total)
            engine.step(1e-3)


def main(calls: list[list[str]]) -> None:
    """Print the measured and the estimated peak of each list of overrides of tiny.yaml."""
    measured, rank = [], 0
    for i, overrides in enumerate([calls[0], *calls]):
        config = load_config(TINY, [*COMMON, *overrides])
        if i == 0:  # once for what libraries load and keep
            config = load_config(TINY, [*COMMON, *overrides, "model.d_model=64"])
        world = start(config.parallel)
        rank = world.rank
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        three_steps(config, world)
        measured.append(
            (resident("VmHWM") - before, estimate_memory(config, world.size, world.device.type).peak)
        )
    if rank == 0:
        print(json.dumps(measured[1:]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
