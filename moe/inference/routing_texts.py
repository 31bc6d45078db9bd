"""The windows of tokens that `routing_statistics` routes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from moe.config import ConfigError, DataConfig
from moe.data.samples import read_samples, spread_starts
from moe.data.token_cache import prepare_corpus
from moe.inference.perplexity import tokenize
from moe.inference.trained_run import TrainedRun


def windows_of_run(run: TrainedRun, num_tokens: int) -> dict[str, Tensor]:
    """Windows of the validation text of a run, and of each of its further ones.

    Args:
        run: from `load_run`.
        num_tokens: of each text, at most; at least one window.

    Returns:
        By name, (B, S + 1) int64, spread evenly over the text.
    """
    corpus = prepare_corpus(run.config)
    texts = corpus.extra_validation or {"validation": corpus.validation}
    length, windows = run.config.data.seq_len, {}
    for name, text in texts.items():
        starts = spread_starts(len(text.tokens), length, max(1, num_tokens // length))
        windows[name] = torch.from_numpy(read_samples(text.tokens, starts, length)).long()
    return windows


def windows_of_files(run: TrainedRun, texts: Mapping[str, DataConfig], num_tokens: int) -> dict[str, Tensor]:
    """Windows of texts, by name; see `windows_of_run`.

    Raises:
        ConfigError: a text cannot be read, or has fewer tokens than one window.
    """
    length, windows = run.config.data.seq_len, {}
    for name, data in texts.items():
        tokens = tokenize(run, data).tokens
        starts = spread_starts(len(tokens), length, max(1, num_tokens // length))
        if len(tokens) <= length:
            raise ConfigError(
                name, f"has {len(tokens) - 1} tokens; a window takes {length}, so give a longer text"
            )
        windows[name] = torch.stack([tokens[start : start + length + 1] for start in starts.tolist()])
    return windows
