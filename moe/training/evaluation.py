"""Validation loss: pure cross-entropy over a fixed set of samples, in evaluation mode."""

import math

import torch
import torch.nn.functional as F

from moe.config import Config
from moe.data.samples import num_samples, read_samples, validation_ids
from moe.data.token_cache import TokenizedCorpus, ValidationText
from moe.training.engine import Engine


def evaluate(engine: Engine, corpus: TokenizedCorpus, config: Config) -> dict[str, float]:
    """Evaluate on `train.eval_batches` global batches of each validation text, or on all of it if it is less.

    The samples and the mean over them depend on neither the topology nor the micro batch. Training state,
    counters and random numbers are untouched.

    Returns:
        `eval/loss` in nats per token and `eval/bits_per_byte`; the same as `eval/NAME/...` for each text of
        `data.extra_validation`.
    """
    metrics = _evaluate_on(corpus.validation, "eval", engine, config)
    for name, text in corpus.extra_validation.items():
        metrics |= _evaluate_on(text, f"eval/{name}", engine, config)
    return metrics


@torch.no_grad()
def _evaluate_on(text: ValidationText, prefix: str, engine: Engine, config: Config) -> dict[str, float]:
    world, seq_len = engine.world, config.data.seq_len
    wanted = config.train.eval_batches * config.train.global_batch_size
    ids = validation_ids(num_samples(text.tokens, seq_len), wanted)
    per_forward = config.train.micro_batch_size
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    engine.module.eval()
    for start in range(0, len(ids), world.size * per_forward):
        # The last batch may leave ranks without samples; they take part all the same, for their experts.
        mine = start + world.rank * per_forward
        samples = read_samples(text.tokens, ids[mine : mine + per_forward], seq_len)
        tokens = torch.from_numpy(samples).to(world.device)
        logits = engine.module(tokens[:, :-1]).logits
        loss_sum += F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    engine.module.train()
    loss = float(engine.sum_over_ranks(loss_sum)) / (len(ids) * seq_len)
    return {f"{prefix}/loss": loss, f"{prefix}/bits_per_byte": loss / math.log(2) / text.bytes_per_token}
