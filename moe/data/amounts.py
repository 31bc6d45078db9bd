"""Whether there is enough text for what is asked."""

from collections.abc import Iterator
from typing import Any

from moe.config import Config, ConfigError, DataConfig
from moe.data.mixture import samples_drawn
from moe.data.samples import num_samples
from moe.data.text import Text
from moe.data.tokenizer import bpe_size

MANY_EPOCHS = 4  # so often can text be repeated at little loss (Muennighoff et al. 2023, arXiv:2305.16264)


def refuse_too_little(config: Config, meta: dict[str, Any], vocabulary: int) -> None:
    """Refuse a corpus that is too small.

    Args:
        config: of the run.
        meta: `splits` with the `tokens` of each, `bad_records` that were skipped, and the `first_bad`.
        vocabulary: tokens that the tokenizer has.

    Raises:
        ConfigError: under the key of the first problem, with all of them.
    """
    problems = list(_problems(config, meta, vocabulary))
    if problems:
        (key, first), *others = problems
        if meta["bad_records"]:
            first += f" (skipped {meta['bad_records']} records, first {meta['first_bad']})"
        raise ConfigError(key, "; also ".join([first, *(f"{key}: {problem}" for key, problem in others)]))


def _problems(config: Config, meta: dict[str, Any], vocabulary: int) -> Iterator[tuple[str, str]]:
    seq_len, data = config.data.seq_len, config.data
    splits = meta["splits"]
    if not any(count["tokens"] for count in splits.values()):
        yield "data.source", f"{_origin(data, next(iter(splits)))} holds no text"
        return
    for split, count in splits.items():
        for name, its in count.get("sources", {split: count}).items():
            origin, tokens = _origin(data, split, name), its["tokens"]
            if tokens == 0:
                problem = f"{origin} has no document in the {split} split"
                yield "data.source", f"{problem}; give more documents, or data.validation"
            elif tokens <= seq_len:
                problem = f"{seq_len} is longer than the {split} text of {origin} ({tokens} tokens)"
                yield "data.seq_len", f"{problem}; give more text or lower it"
            elif split == "train":
                yield from _too_many_epochs(config, name, tokens)
    if data.tokenizer.startswith("bpe:") and vocabulary < bpe_size(data.tokenizer):
        yield "data.tokenizer", f"the corpus supports only {vocabulary} tokens; use bpe:{vocabulary} or bytes"


def _origin(data: DataConfig, split: str, name: str = "") -> str:
    """What the user gave as the source of a text."""
    if name in data.sources:
        return data.sources[name].source
    if split in ("train", "validation"):
        return data.validation if split == "validation" and data.validation else data.source
    return data.extra_validation[split]


def _too_many_epochs(config: Config, name: str, tokens: int) -> Iterator[tuple[str, str]]:
    source = config.data.sources.get(name)
    if source is None or source.max_epochs is None:
        return
    epochs = samples_drawn(config, config.train.steps)[name] / num_samples(tokens, config.data.seq_len)
    if epochs > source.max_epochs:
        problem = f"{source.max_epochs:g}, but train.steps={config.train.steps} reads it {epochs:.2f} times"
        yield f"data.sources.{name}.max_epochs", f"{problem}; lower its weight, or give more text"


def corpus_warnings(config: Config, train: Text, validation: Text) -> Iterator[str]:
    """What a user should know about a corpus that is small for the run.

    Args:
        config: of the run.
        train: the training text.
        validation: the validation text.
    """
    per_batch = config.train.global_batch_size * config.data.seq_len
    drawn = {"": config.train.steps * config.train.global_batch_size}
    if config.data.sources:
        drawn = samples_drawn(config, config.train.steps)
    for (name, samples), tokens in zip(drawn.items(), train.sources.values(), strict=True):
        epochs = samples * config.data.seq_len / len(tokens)
        if epochs > MANY_EPOCHS:
            of_source = f" of {name}" if name else ""
            yield (
                f"train.steps={config.train.steps} reads the {len(tokens):,} training tokens{of_source} "
                f"{epochs:.1f} times; watch the validation loss, use fewer steps or give more text"
            )
    wanted = config.train.eval_batches * per_batch
    if len(validation.tokens) < min(wanted, 16 * config.data.seq_len):
        yield (
            f"there are only {len(validation.tokens):,} validation tokens, so the validation loss is noisy; "
            "raise data.validation_share or set data.validation"
        )
