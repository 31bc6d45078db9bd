"""Whether there is enough text for what is asked."""

from collections.abc import Iterator
from typing import Any

from moe.config import Config, ConfigError
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
    sources = {"train": data.source, "validation": data.validation or data.source} | data.extra_validation
    counts = {name: count["tokens"] for name, count in meta["splits"].items()}
    if not any(counts.values()):
        yield "data.source", f"{sources[next(iter(counts))]} holds no text"
        return
    if data.tokenizer.startswith("bpe:") and vocabulary < bpe_size(data.tokenizer):
        yield "data.tokenizer", f"the corpus supports only {vocabulary} tokens; use bpe:{vocabulary} or bytes"
    for name, tokens in counts.items():
        if tokens == 0:
            problem = f"{sources[name]} has no document in the {name} split"
            yield "data.source", f"{problem}; give more documents, or data.validation"
        elif tokens <= seq_len:
            problem = f"{seq_len} is longer than the {name} text of {sources[name]} ({tokens} tokens)"
            yield "data.seq_len", f"{problem}; lower it or give more text"


def corpus_warnings(config: Config, train_tokens: int, validation_tokens: int) -> Iterator[str]:
    """What a user should know about a corpus that is small for the run.

    Args:
        config: of the run.
        train_tokens: in the training text.
        validation_tokens: in the validation text.
    """
    per_batch = config.train.global_batch_size * config.data.seq_len
    epochs = config.train.steps * per_batch / train_tokens
    if epochs > MANY_EPOCHS:
        yield (
            f"train.steps={config.train.steps} reads the {train_tokens:,} training tokens {epochs:.1f} "
            "times; watch the validation loss, use fewer steps or give more text"
        )
    wanted = config.train.eval_batches * per_batch
    if validation_tokens < min(wanted, 16 * config.data.seq_len):
        yield (
            f"there are only {validation_tokens:,} validation tokens, so the validation loss is noisy; raise "
            "data.validation_share or set data.validation"
        )
