"""Generate text: sample one token after another from a model."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.config import ConfigError
from moe.inference.trained_run import TrainedRun
from moe.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens that together reach this mass (Holtzman et al. 2020).
        seed: of this text alone; the global random state is untouched.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", f"should be at least 1, got {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise ConfigError("temperature", f"should be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"should be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", f"should be at least 0 and below 2**63, got {self.seed}")


def generate(run: TrainedRun, prompt: str = "", sampling: Sampling | None = None) -> str:
    """The prompt and its continuation by a run from `load_run`; an empty prompt starts a document."""
    ids = run.tokenizer.encode(prompt, add_special_tokens=False).ids or [run.end_id]
    tokens = torch.tensor(ids, device=run.model.embedding.weight.device)
    tokens = generate_tokens(run.model, tokens, sampling or Sampling(), run.end_id)
    return run.tokenizer.decode(tokens.tolist())


@torch.no_grad()
def generate_tokens(
    model: Transformer,
    prompt: Tensor,
    sampling: Sampling,
    end_id: int | None = None,
    agree: Callable[[Tensor], Tensor] = lambda token: token,
) -> Tensor:
    """Extend a prompt token by token, recomputing the context each time.

    Args:
        model: put into evaluation mode for the duration; it sees its `max_seq_len` last tokens.
        prompt: (S,) int64, at least one token, on the model's device.
        sampling: how tokens are chosen.
        end_id: stop after this token.
        agree: makes each new token (1,) the same on all ranks, where they share the experts.

    Returns:
        (S + new,) int64.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    was_training = model.training
    model.eval()
    tokens = prompt
    for _ in range(sampling.max_new_tokens):
        logits = model(tokens[None, -model.max_seq_len :]).logits[0, -1].float().cpu()
        token = agree(choose_token(logits, sampling, generator).to(tokens.device))
        tokens = torch.cat([tokens, token])
        if token.item() == end_id:
            break
    model.train(was_training)
    return tokens


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token (1,) int64 from its logits (V,) fp32."""
    if sampling.temperature == 0:
        return logits.argmax()[None]
    probs = ((logits - logits.max()) / sampling.temperature).softmax(0)
    probs, order = probs.sort(descending=True, stable=True)
    outside = probs.cumsum(0) - probs >= sampling.top_p  # the token that crosses top_p still belongs
    return order[probs.masked_fill(outside, 0).multinomial(1, generator=generator)]
