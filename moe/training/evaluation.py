"""Validation loss: pure cross-entropy over a fixed set of samples, in evaluation mode."""

import math

import torch

from moe.config import Config, RunError
from moe.data.batches import read_batches
from moe.data.samples import spread_starts
from moe.data.text import Text
from moe.data.token_cache import TokenizedCorpus
from moe.distributed.launch import widest_float
from moe.training.engine import Engine


def evaluate(engine: Engine, corpus: TokenizedCorpus, config: Config) -> dict[str, float]:
    """Evaluate on `train.eval_batches` global batches of each validation text, or on all of it if it is less.

    The samples and the mean over them depend on neither the topology nor the micro batch. Training state,
    counters and random numbers are untouched.

    Returns:
        `eval/loss` in nats per token and `eval/bits_per_byte`; the same as `eval/NAME/...` for each source of
        a mixture, and for each text of `data.extra_validation`.
    """
    metrics = _evaluate_on(corpus.validation, "eval", engine, config)
    for name, text in corpus.extra_validation.items():
        metrics |= _evaluate_on(text, f"eval/{name}", engine, config)
    return metrics


def check_finite(loss: float, step: int) -> None:
    """Stop the run before a checkpoint is saved whose validation loss is not finite.

    Raises:
        RunError: it is not.
    """
    if not math.isfinite(loss):
        raise RunError(
            f"step {step}: eval/loss is {loss}; nothing of this step was saved. Start a new run with a lower "
            "optim.lr or optim.grad_clip"
        )


@torch.no_grad()
def _evaluate_on(text: Text, prefix: str, engine: Engine, config: Config) -> dict[str, float]:
    world, seq_len = engine.world, config.data.seq_len
    wanted = config.train.eval_batches * config.train.global_batch_size
    starts = spread_starts(len(text.tokens), seq_len, wanted)
    per_forward = config.train.micro_batch_size
    loss_sum = torch.zeros((), dtype=widest_float(world.device), device=world.device)
    engine.module.eval()
    for first in range(0, len(starts), world.size * per_forward):
        # The last batch may leave ranks without samples; they take part all the same, for their experts.
        mine = first + world.rank * per_forward
        [batch] = read_batches(config, text, starts[mine : mine + per_forward], world.device)
        loss_sum += engine.module(batch.tokens, batch.documents, targets=batch.targets).nats
    engine.module.train()
    loss = float(engine.sum_over_ranks(loss_sum)) / (len(starts) * seq_len)
    return {f"{prefix}/loss": loss, f"{prefix}/bits_per_byte": loss / math.log(2) / text.bytes_per_token}
