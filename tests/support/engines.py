"""A small model under the engine, and training it on fixed batches."""

from typing import Any

import torch
from torch import Tensor

from moe.config import Config, parse_config
from moe.dispatch.all_to_all import choose_dispatcher
from moe.distributed.groups import World
from moe.model.transformer import Transformer, TransformerOutput
from moe.training.engine import Engine
from moe.training.loss import training_loss
from moe.training.optimizer import learning_rate


def make_config(**sections: dict[str, Any]) -> Config:
    """Ten steps of a model of two layers, with the keys of some sections changed."""
    base: dict[str, dict[str, Any]] = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 64, "vocab_size": 50},
        "moe": {"num_experts": 4, "top_k": 2, "d_ff_expert": 32},
        "data": {"seq_len": 16},
        "train": {"global_batch_size": 8, "micro_batch_size": 8, "steps": 10},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "grad_clip": 0.5},
        "parallel": {"device": "cpu"},
    }
    return parse_config({name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


def make_engine(config: Config, world: World) -> Engine:
    """The model of a configuration under the engine, its experts where the world's groups put them."""
    with torch.device("meta"):
        model = Transformer(config, choose_dispatcher(world.groups, config.parallel), "grouped_mm")
    engine = Engine(model, config, world)
    engine.training_state.initialize(config.run.seed)
    return engine


def batches(steps: int) -> Tensor:
    """The same tokens (steps, 8, 17) each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 50, (steps, 8, 17), generator=generator)


def loss_of(output: TransformerOutput, tokens: Tensor, config: Config) -> Tensor:
    """The training loss of tokens (B, S + 1)."""
    return training_loss(output, tokens[:, 1:], config.moe).total


def run_engine(engine: Engine, config: Config, steps: int, first: int = 0) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of some steps in one process."""
    losses, norms = [], []
    micro = config.train.micro_batch_size
    for step in range(first, first + steps):
        total, norms_of_step = 0.0, None
        for part in batches(20)[step].split(micro):
            loss = loss_of(engine(part[:, :-1]), part, config)
            engine.backward(loss)
            norms_of_step = engine.step(learning_rate(config, step))
            total += loss.item() * micro / 8
        assert norms_of_step is not None
        losses.append(total)
        norms.append(norms_of_step.total)
    return losses, norms
