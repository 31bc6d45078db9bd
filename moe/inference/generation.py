"""Sample text from a model, and load a model from a finished run."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.saving import newest_checkpoint
from moe.config.loading import load_config
from moe.config.schema import Config, ConfigError
from moe.data.tokenizer import read_tokenizer
from moe.dispatch.all_to_all import LocalDispatcher
from moe.model.grouped_mm import choose_expert_path
from moe.model.transformer import Transformer
from moe.runs.run_folder import RunFolder


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    max_context: int,
    end_id: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda token: token,
) -> Tensor:
    """Extend a prompt token by token, recomputing the context each time.

    Args:
        model: a `Transformer`; put into evaluation mode for the duration.
        prompt: (S,) int64, at least one token, on the model's device.
        max_new_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: samples among the likeliest tokens that together reach this mass (Holtzman et al. 2020).
        seed: of this text alone; the global random state is untouched.
        max_context: the model sees this many last tokens.
        end_id: stop after this token.
        agree: what makes each new token (1,) the same on all ranks, where they share the experts.

    Returns:
        (S + new,) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = prompt
    for _ in range(max_new_tokens):
        logits = model(tokens[None, -max_context:]).logits[0, -1].float().cpu()
        token = agree(_sample(logits, temperature, top_p, generator).to(tokens.device))
        tokens = torch.cat([tokens, token])
        if token.item() == end_id:
            break
    model.train(was_training)
    return tokens


def load_model(run: Path, device: torch.device) -> tuple[Transformer, Tokenizer, Config]:
    """Load the newest checkpoint of a run in fp32, in evaluation mode.

    Raises:
        ConfigError: the folder is no run, or holds no sound checkpoint.
    """
    folder = RunFolder(run)
    if not folder.config.exists():
        raise ConfigError("RUN", f"{run} is no run folder; give one that train.py made, such as runs/tiny")
    config = load_config(folder.config)
    checkpoint, warnings = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ConfigError("RUN", warnings[0] if warnings else f"{run} has no checkpoint yet")
    model = Transformer(config, LocalDispatcher(), choose_expert_path(device, torch.float32))
    parameters = dict(model.named_parameters())
    try:
        checkpoint.check_names("weights", {name: tuple(p.shape) for name, p in parameters.items()})
    except CheckpointError as error:
        raise ConfigError("RUN", f"{error}; {folder.config} is of another model") from None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.read("weights", name).view(parameter.shape))
    return model.to(device).eval(), read_tokenizer(folder.tokenizer, "RUN"), config


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax()[None]
    probs, order = ((logits - logits.max()) / temperature).softmax(0).sort(descending=True, stable=True)
    outside = probs.cumsum(0) - probs >= top_p  # the token that crosses top_p still belongs
    return order[probs.masked_fill(outside, 0).multinomial(1, generator=generator)]
