"""Which samples make up a step, and reading them. A sample is `seq_len` tokens and their successors."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from moe.config import Config
from moe.data.mixture import draw
from moe.data.text import Text


def samples_of_step(config: Config, text: Text, step: int) -> np.ndarray:
    """Where the samples of a step start, (global_batch_size,) int64: a function of these arguments alone.

    Args:
        config: of the run.
        text: the training text.
        step: 0 for the first optimizer step.
    """
    first, size = step * config.train.global_batch_size, config.train.global_batch_size
    places = np.arange(first, first + size)
    which = np.zeros_like(places)
    if config.data.sources:
        which, places = draw(config, places)
    starts = np.empty_like(places)
    for number, tokens in enumerate(text.sources.values()):
        here = which == number
        ids = sample_ids(config, places[here], num_samples(len(tokens), config.data.seq_len), number)
        starts[here] = tokens.start + ids * config.data.seq_len
    return starts


def sample_ids(config: Config, places: np.ndarray, num_samples: int, source: int = 0) -> np.ndarray:
    """Which samples of a source come up.

    Every epoch is a permutation of its own. A stream is not shuffled, or in windows of `data.shuffle_buffer`
    samples, so that a longer prefix of the stream changes no earlier sample.

    Args:
        config: of the run.
        places: (n,) int64, the first sample that the run takes of the source is 0.
        num_samples: in the source.
        source: its number.

    Returns:
        (n,) int64, each in [0, num_samples).
    """
    epochs, places = np.divmod(places, num_samples)
    if config.data.streaming and not config.data.shuffle_buffer:
        return places
    window = config.data.shuffle_buffer or num_samples
    windows, places = np.divmod(places, window)
    ids = np.empty_like(places)
    for epoch, number in {*zip(epochs.tolist(), windows.tolist(), strict=True)}:
        here = (epochs == epoch) & (windows == number)
        size = min(window, num_samples - number * window)
        ids[here] = number * window + _orders(source)(config.run.seed, epoch, number, size)[places[here]]
    return ids


@lru_cache
def _orders(source: int) -> Callable[[int, int, int, int], np.ndarray]:
    """`_order` for one source, which remembers the last two: a batch may straddle two epochs."""
    return lru_cache(maxsize=2)(_order)


def _order(seed: int, epoch: int, window: int, size: int) -> np.ndarray:
    entropy = [seed, epoch] if window == 0 else [seed, epoch, window]
    return np.random.Generator(np.random.PCG64(entropy)).permutation(size)


def spread_starts(num_tokens: int, seq_len: int, wanted: int) -> np.ndarray:
    """Where at most `wanted` samples start, evenly spread over a text: the same for every seed and step."""
    num = num_samples(num_tokens, seq_len)
    return np.linspace(0, num - 1, min(wanted, num)).round().astype(np.int64) * seq_len


def num_samples(num_tokens: int, seq_len: int) -> int:
    """Whole samples in a text; a sample's last target is the next one's first token."""
    return (num_tokens - 1) // seq_len


def read_samples(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """Cut samples out of a text.

    Args:
        tokens: (n,) of the text.
        starts: (B,) where the samples start.
        seq_len: S.

    Returns:
        (B, S + 1) int64: inputs are `[:, :-1]`, targets `[:, 1:]`.
    """
    samples = [tokens[start : start + seq_len + 1] for start in starts]
    return np.array(samples, dtype=np.int64).reshape(len(starts), seq_len + 1)


def documents_of_samples(documents: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    """The document of each input token.

    Args:
        documents: (documents,) int64, the first token of each, ascending.
        starts: (B,) where the samples start.
        seq_len: S.

    Returns:
        (B, S) int64: the number of a document; equal within a document, and ascending.
    """
    places = starts[:, None] + np.arange(seq_len)
    return np.searchsorted(documents, places, side="right")
