"""Tokenizers: trained here (`bpe:N`), fixed (`bytes`), from a `tokenizer.json`, or from the hub."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe.config import Config, ConfigError, first_line

END_TOKEN = "<|endoftext|>"
_KNOWN_END_TOKENS = (END_TOKEN, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
BPE_TRAINING_BYTES = 32 * 2**20  # more text changes a small vocabulary little and costs time


def load_tokenizer(spec: str, training_texts: Iterable[str], revision: str | None = None) -> Tokenizer:
    """Make the tokenizer that `data.tokenizer` names.

    Args:
        spec: `bpe:N`, `bytes`, the path of a `tokenizer.json`, or a hub name.
        training_texts: the training split; read for `bpe:N` only. Little text gives fewer than N tokens.
        revision: the commit of a hub name; None: the newest.

    Raises:
        ConfigError: no such tokenizer.
    """
    tokenizer = _make_tokenizer(spec, training_texts, revision)
    tokenizer.no_truncation()  # some tokenizer.json bring these along; a document is never cut or padded
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id: some vocabularies have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def with_vocabulary(config: Config) -> Config:
    """The configuration with `model.vocab_size` filled in, from the tokenizer that it names.

    Raises:
        ConfigError: no such tokenizer, or `model.vocab_size` is less than its vocabulary.
    """
    spec = config.data.tokenizer
    if spec.startswith("bpe:"):
        return config.resolve(bpe_size(spec))
    if config.model.vocab_size is not None and spec != "bytes":
        return config
    try:
        return config.resolve(vocabulary_size(load_tokenizer(spec, (), config.data.tokenizer_revision)))
    except ConfigError as error:
        raise ConfigError("model.vocab_size", f"set it, because {error}") from None


def bpe_size(spec: str) -> int:
    """The N of `bpe:N`.

    Raises:
        ConfigError: it is no number, or too small.
    """
    size = spec.removeprefix("bpe:")
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if not (size.isascii() and size.isdecimal()) or not smallest <= int(size) <= 1_000_000:
        raise ConfigError("data.tokenizer", f"{spec!r} should be bpe:N with N at least {smallest}")
    return int(size)


def find_revision(spec: str, revision: str | None) -> str | None:
    """The commit of a hub tokenizer: the given one, the one in the hub's cache here, or the newest.

    Raises:
        ConfigError: the hub has no answer.
    """
    if spec.startswith("bpe:") or spec == "bytes" or _local_file(spec) is not None:
        return None
    return revision or _hub_file(spec, None).parent.name  # .../snapshots/COMMIT/tokenizer.json


def _make_tokenizer(spec: str, training_texts: Iterable[str], revision: str | None) -> Tokenizer:
    if spec.startswith("bpe:"):
        return _train_bpe(bpe_size(spec), training_texts)
    if spec == "bytes":
        alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = _byte_level(models.BPE(vocab=alphabet, merges=[]))
        tokenizer.add_special_tokens([END_TOKEN])
        return tokenizer
    return read_tokenizer(_local_file(spec) or _hub_file(spec, revision), "data.tokenizer")


def _local_file(spec: str) -> Path | None:
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    return path if path.is_file() or path.suffix == ".json" else None


def _hub_file(spec: str, revision: str | None) -> Path:
    """The `tokenizer.json` of a hub name, downloaded if need be."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache  # takes a third of a second

    cached = (
        try_to_load_from_cache(spec, "tokenizer.json", revision=revision) if spec.count("/") == 1 else None
    )
    if isinstance(cached, str):
        return Path(cached)
    try:
        HfApi().model_info(spec, timeout=20)  # answers at once, where the download would retry for 23 s
        return Path(hf_hub_download(spec, "tokenizer.json", revision=revision))
    except Exception as error:  # the hub client's errors differ from version to version
        problem = f"{spec!r} is neither bpe:N, bytes nor a file here, and the hub has no answer"
        reason = f"({first_line(error)[:120]}); check the name and the network"
        raise ConfigError("data.tokenizer", f"{problem} {reason}") from None


def read_tokenizer(path: Path, key: str) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        ConfigError: under `key`, if it is not there or not a tokenizer.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception on bad files
        raise ConfigError(key, f"cannot read tokenizer {path} ({first_line(error)[:120]})") from None


def end_token(tokenizer: Tokenizer, named: str | None) -> str:
    """The token that ends a document: the named one, or the well-known one that the vocabulary has.

    Raises:
        ConfigError: the vocabulary has no such token.
    """
    candidates = (named,) if named is not None else _KNOWN_END_TOKENS
    for token in candidates:
        if tokenizer.token_to_id(token) is not None:
            return token
    names = " or ".join(candidates)
    raise ConfigError("data.end_token", f"the tokenizer has no token {names}; name the one it has")


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_bytes(texts, BPE_TRAINING_BYTES), trainer)
    return tokenizer


def _byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first texts, up to the one that reaches `limit` characters."""
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return
