"""Samples on the device, in micro batches."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe.config import Config
from moe.data.samples import documents_of_samples, read_samples
from moe.data.text import Text
from moe.model.dropout import dropout_keys


class Batch(NamedTuple):
    """What a forward pass takes, and what it should predict.

    Attributes:
        tokens: (B, S) int64.
        documents: (B, S) int64, the number of each token's document; None: attention is not masked by
            documents, or each sample is of one document.
        targets: (B, S) int64, the next tokens.
        dropout_keys: (B,) int32, see `dropout.dropout_keys`; None without a dropout and noise of routers.
    """

    tokens: Tensor
    documents: Tensor | None
    targets: Tensor
    dropout_keys: Tensor | None


def read_batches(
    config: Config, text: Text, starts: np.ndarray, device: torch.device, step: int | None = None
) -> list[Batch]:
    """Read the samples that start at some tokens of a text, `train.micro_batch_size` to a batch.

    Without any sample it is one batch of none. All are moved at once. Training names its step, on which the
    masks of a dropout and the noise of routers depend.
    """
    size, seq_len = config.train.micro_batch_size, config.data.seq_len
    samples = _moved(torch.from_numpy(read_samples(text.tokens, starts, seq_len)), device).split(size)
    documents: list[Tensor | None] = [None] * len(samples)
    if config.data.document_masks:
        numbers = documents_of_samples(text.documents, starts, seq_len)
        needed = torch.from_numpy(numbers[:, 0] != numbers[:, -1]).split(size)
        numbers = _moved(torch.from_numpy(numbers), device).split(size)
        documents = [mask if bool(need.any()) else None for mask, need in zip(numbers, needed, strict=True)]
    keys: list[Tensor | None] = [None] * len(samples)
    if step is not None and (config.model.dropout or config.moe.is_noisy):
        keys = list(_moved(dropout_keys(config.run.seed, step, starts.tolist()), device).split(size))
    return [
        Batch(sample[:, :-1], mask, sample[:, 1:], key)
        for sample, mask, key in zip(samples, documents, keys, strict=True)
    ]


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for a GPU."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
