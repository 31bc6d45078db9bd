"""Validation loss: pure cross-entropy over a fixed set of samples, in evaluation mode."""

import math

import torch
import torch.nn.functional as F

from moe.config import Config
from moe.data.samples import num_samples, read_samples, validation_ids
from moe.data.token_cache import TokenizedCorpus
from moe.training.engine import Engine


@torch.no_grad()
def evaluate(engine: Engine, corpus: TokenizedCorpus, config: Config) -> dict[str, float]:
    """Evaluate on `train.eval_batches` global batches, or on the whole split if that is less.

    The samples and the mean over them depend on neither the topology nor the micro batch. Training state,
    counters and random numbers are untouched.

    Returns:
        `eval/loss` in nats per token and `eval/bits_per_byte`.
    """
    world, seq_len = engine.world, config.data.seq_len
    wanted = config.train.eval_batches * config.train.global_batch_size
    ids = validation_ids(num_samples(corpus.validation, seq_len), wanted)
    per_forward = config.train.micro_batch_size
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    engine.module.eval()
    for start in range(0, len(ids), world.size * per_forward):
        # The last batch may leave ranks without samples; they take part all the same, for their experts.
        mine = start + world.rank * per_forward
        samples = read_samples(corpus.validation, ids[mine : mine + per_forward], seq_len)
        tokens = torch.from_numpy(samples).to(world.device)
        logits = engine.module(tokens[:, :-1]).logits
        loss_sum += F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    engine.module.train()
    loss = float(engine.sum_over_ranks(loss_sum)) / (len(ids) * seq_len)
    bits_per_byte = loss / math.log(2) / corpus.validation_bytes_per_token
    return {"eval/loss": loss, "eval/bits_per_byte": bits_per_byte}
