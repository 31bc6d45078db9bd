"""Which samples make up a step, and reading them. A sample is `seq_len` tokens and their successors."""

from functools import lru_cache

import numpy as np

from moe.config import Config


def samples_of_step(config: Config, tokens: np.ndarray, step: int) -> np.ndarray:
    """The ids (global_batch_size,) of a step, 0 for the first one, from the training split `tokens` (n,)."""
    size, num = config.train.global_batch_size, num_samples(tokens, config.data.seq_len)
    return sample_ids(config.run.seed, step, size, num, shuffle=not config.data.streaming)


def sample_ids(seed: int, step: int, global_batch_size: int, num_samples: int, shuffle: bool) -> np.ndarray:
    """Which samples make up the global batch of a step: a function of these arguments and nothing else.

    Every epoch is a permutation of its own, and a batch may straddle two epochs. Unshuffled (a stream), the
    samples come in the order of the corpus, so that a longer prefix of the stream changes no earlier batch.

    Args:
        seed: `run.seed`.
        step: 0 for the first optimizer step.
        global_batch_size: samples per step.
        num_samples: samples in the training split.
        shuffle: whether to permute each epoch.

    Returns:
        (global_batch_size,) int64, each in [0, num_samples).
    """
    first = step * global_batch_size
    epochs, places = np.divmod(np.arange(first, first + global_batch_size), num_samples)
    if not shuffle:
        return places
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        order = _epoch_order(seed, int(epoch), num_samples)
        ids[epochs == epoch] = order[places[epochs == epoch]]
    return ids


@lru_cache(maxsize=2)  # a batch straddles at most two epochs, unless the corpus is tiny
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_samples)


def validation_ids(num_samples: int, wanted: int) -> np.ndarray:
    """At most `wanted` samples, evenly spread over the validation split: the same for every seed and step."""
    return np.linspace(0, num_samples - 1, min(wanted, num_samples)).round().astype(np.int64)


def num_samples(tokens: np.ndarray, seq_len: int) -> int:
    """Whole samples in a split; a sample's last target is the next one's first token."""
    return (len(tokens) - 1) // seq_len


def read_samples(tokens: np.ndarray, ids: np.ndarray, seq_len: int) -> np.ndarray:
    """Cut samples out of a split.

    Args:
        tokens: (n,) of one split.
        ids: (B,) sample ids.
        seq_len: S.

    Returns:
        (B, S + 1) int64: inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    samples = [tokens[i * seq_len : (i + 1) * seq_len + 1] for i in ids]
    return np.array(samples, dtype=np.int64).reshape(len(ids), seq_len + 1)
