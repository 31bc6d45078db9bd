"""Measure, as one rank, the growth of resident memory over two training steps of each configuration given.

The parent sets MALLOC_MMAP_THRESHOLD_, so that glibc returns memory as soon as it is freed and the peak is
that of what is alive.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from moe.accounting.memory import estimate_memory
from moe.config import load_config
from moe.dispatch.all_to_all import choose_dispatcher
from moe.model.grouped_mm import choose_expert_path
from moe.model.initialization import init_weights
from moe.model.transformer import Transformer
from moe.training.engine import Engine, start

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"


def resident(field):
    """Bytes of `VmRSS`, now, or `VmHWM`, at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(config, world):
    """Two steps on random tokens, as train.py takes them; the parts of each step and nothing else."""
    torch.manual_seed(world.rank)
    path = choose_expert_path(world.device, torch.float32)
    model = Transformer(config, choose_dispatcher(world.groups, config.parallel), path)
    init_weights(model, 0)
    engine = Engine(model, config, world)
    for _step in range(2):
        for _micro in range(config.accumulation_steps(world.size)):
            shape = (config.train.micro_batch_size, config.data.seq_len + 1)
            tokens = torch.randint(0, config.model.vocab_size, shape)
            logits, aux = engine(tokens[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
            if aux is not None:
                loss = loss + 0.01 * aux.load_balancing_loss.mean() + 0.001 * aux.router_z_loss.mean()
            engine.backward(loss)
            engine.step(1e-3)


def main(calls):
    measured = []
    for i, overrides in enumerate([calls[0], *calls]):
        config = load_config(CONFIG, ["model.vocab_size=1024", *overrides])
        if i == 0:  # once for what libraries load and keep
            config = load_config(CONFIG, ["model.vocab_size=1024", *overrides, "model.d_model=64"])
        world = start(config.parallel)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        train(config, world)
        measured.append(
            (resident("VmHWM") - before, estimate_memory(config, world.size, world.device.type).peak)
        )
    if world.rank == 0:
        print(json.dumps(measured[1:]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
