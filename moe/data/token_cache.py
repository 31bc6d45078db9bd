"""Tokenize a corpus once into memory-mapped files.

A prepared corpus is a folder of the cache, named by a hash of the content and of every setting that shapes
its tokens. It is written under a temporary name and renamed, so it is complete or not there.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moe.config import Config, ConfigError, DataConfig, changed
from moe.data.amounts import refuse_too_little
from moe.data.build_lock import alone
from moe.data.corpus import BadRecords, Corpus, Document, open_corpus
from moe.data.token_files import TokenFiles, with_progress
from moe.data.tokenizer import end_token, find_revision, load_tokenizer, read_tokenizer, vocabulary_size

_FORMAT, _LAYOUT = 2, 2  # of the tokens; of the files of the cache


@dataclass(frozen=True)
class ValidationText:
    """Tokens that are evaluated on.

    Attributes:
        tokens: (n,) uint16 or uint32, memory-mapped, documents in order, each followed by the end token.
        bytes_per_token: UTF-8 bytes of the documents over their tokens, end tokens included: what turns nats
            per token into bits per byte.
    """

    tokens: np.ndarray
    bytes_per_token: float


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready for training.

    Attributes:
        fingerprint: hash of content and settings; equal fingerprints mean equal tokens in the same order,
            of which a stream may hold more or fewer.
        tokenizer: of these tokens.
        end_token: the token after each document.
        train: (n,) uint16 or uint32, memory-mapped, documents in order, each followed by the end token.
        validation: held-out text.
        extra_validation: the texts of `data.extra_validation` by name.
        revisions: `data.revision` and `data.tokenizer_revision` as they were found on the hub.
    """

    fingerprint: str
    tokenizer: Tokenizer
    end_token: str
    train: np.ndarray
    validation: ValidationText
    extra_validation: dict[str, ValidationText]
    revisions: dict[str, str | None]


def prepare_corpus(config: Config) -> TokenizedCorpus:
    """Tokenize the corpus of a configuration, or open it from the cache.

    Raises:
        ConfigError: anything wrong with a source, the tokenizer, the cache folder or the amount of text;
            no part of it is left in the cache then.
    """
    revision = find_revision(config.data.tokenizer, config.data.tokenizer_revision)
    config = changed(config, {"data.tokenizer_revision": revision})
    data = config.data
    sources = {"train": _open_source(data, "data.source", data.source)}
    if data.validation is not None:
        sources["validation"] = _open_source(data, "data.validation", data.validation)
    extra = {
        name: _open_source(data, "data.extra_validation", source)
        for name, source in data.extra_validation.items()
    }
    settings = _settings(data, sources) | {"tokenizer": _tokenizer_identity(data)}
    tokens, tokenizer, end = _prepare(config, sources, settings)
    validation = {}
    for name, corpus in extra.items():
        own = _settings(data, {name: corpus}) | {"tokenizer": tokenizer.to_str(), "end_token": end}
        validation |= _prepare(config, {name: corpus}, own, tokenizer)[0]
    return TokenizedCorpus(
        fingerprint=_hash(settings),
        tokenizer=tokenizer,
        end_token=end,
        train=tokens["train"].tokens,
        validation=tokens["validation"],
        extra_validation=validation,
        revisions={
            "data.revision": sources["train"].revision,
            "data.tokenizer_revision": data.tokenizer_revision,
        },
    )


def cache_folder(data: DataConfig) -> Path:
    """Where prepared corpora live."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gatework"


def _open_source(data: DataConfig, key: str, source: str) -> Corpus:
    """The corpus that a key names; of a source of validation text, or beside one, nothing is held out."""
    is_split = key == "data.source" and data.validation is None
    changes = {"source": source} if is_split else {"source": source, "validation_share": 0.0}
    try:
        return open_corpus(data.model_copy(update=changes), cache_folder(data))
    except ConfigError as error:
        raise error if error.key != "data.source" else ConfigError(key, error.message) from None


def _settings(data: DataConfig, sources: dict[str, Corpus]) -> dict[str, Any]:
    """All that shapes the tokens, besides the tokenizer.

    Keys that came later count where they differ from their defaults, so that older runs can be resumed.
    """
    content = [corpus.fingerprint for corpus in sources.values()]
    settings = {
        "format": _FORMAT,
        "content": content[0],
        "end_token": data.end_token,
        "text_field": data.text_field,
    }
    later = data.model_dump(include={"encoding", "on_bad_record", "validation_share"})
    settings |= {key: value for key, value in later.items() if value != DataConfig.model_fields[key].default}
    return settings | ({"validation": content[1]} if len(content) > 1 else {})


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_identity(data: DataConfig) -> str:
    path = Path(data.tokenizer).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    revision = data.tokenizer_revision
    return data.tokenizer if revision is None else f"{data.tokenizer}@{revision}"


def _token_limits(config: Config, names: list[str]) -> dict[str, int]:
    """How many tokens to read for each name, if the corpus is a stream."""
    per_batch = config.train.global_batch_size * config.data.seq_len
    batches = {name: config.train.steps if name == "train" else config.train.eval_batches for name in names}
    return {name: n * per_batch + 1 for name, n in batches.items()} if config.data.streaming else {}


def _prepare(
    config: Config, sources: dict[str, Corpus], settings: dict[str, Any], tokenizer: Tokenizer | None = None
) -> tuple[dict[str, ValidationText], Tokenizer, str]:
    """The tokens of some sources by name, made or opened; their tokenizer, and their end token."""
    limits = _token_limits(config, _names(sources))
    folder = cache_folder(config.data) / _hash({**settings, "limits": limits, "layout": _LAYOUT})
    if not (folder / "meta.json").exists():
        with alone(folder.parent, folder.name, config.data.cache_timeout_s):
            if not (folder / "meta.json").exists():
                _build(config, sources, tokenizer, limits, folder)
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = read_tokenizer(folder / "tokenizer.json", "data.cache_dir")
    refuse_too_little(config, meta, vocabulary_size(tokenizer))
    if meta["bad_records"]:
        count, first = meta["bad_records"], meta["first_bad"]
        print(f"data.on_bad_record=skip left out {count} records, first {first}", file=sys.stderr)
    tokens = {name: _open_tokens(folder / f"{name}.bin", count) for name, count in meta["splits"].items()}
    return tokens, tokenizer, meta["end_token"]


def _build(
    config: Config,
    sources: dict[str, Corpus],
    tokenizer: Tokenizer | None,
    limits: dict[str, int],
    folder: Path,
) -> None:
    """Tokenize the sources into the folder; without a tokenizer it is made first."""
    try:
        for orphan in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
            shutil.rmtree(orphan, ignore_errors=True)
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        scratch.mkdir()
    except OSError as error:
        raise ConfigError("data.cache_dir", f"cannot write to {folder.parent} ({error.strerror})") from None
    try:
        if tokenizer is None:
            documents = with_progress(
                BadRecords(skip=True).left_out(sources["train"]), "training the tokenizer"
            )
            texts = (document.text for document in documents if document.split == "train")
            tokenizer = load_tokenizer(config.data.tokenizer, texts, config.data.tokenizer_revision)
        end = end_token(tokenizer, config.data.end_token)
        config.resolve(vocabulary_size(tokenizer))  # refuses a vocabulary that does not fit
        tokenizer.save(str(scratch / "tokenizer.json"))
        bad = BadRecords(skip=config.data.on_bad_record == "skip")
        with TokenFiles(scratch, _names(sources), tokenizer, end, limits) as files:
            is_split = "train" in sources and "validation" not in sources
            for source, corpus in sources.items():
                documents = with_progress(bad.left_out(corpus), "tokenizing")
                files.write(_by_name(documents, source, is_split), files.counts if is_split else [source])
        meta = {"end_token": end, "splits": files.counts, "bad_records": bad.number, "first_bad": bad.first}
        refuse_too_little(config, meta, vocabulary_size(tokenizer))
        (scratch / "meta.json").write_text(json.dumps(meta))
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _names(sources: dict[str, Corpus]) -> list[str]:
    """Of the token files: a training source without a validation source gives text for both."""
    return ["train", "validation"] if "train" in sources else list(sources)


def _by_name(documents: Iterator[Document], source: str, is_split: bool) -> Iterator[tuple[str, Document]]:
    """Each document with the name of the token file it belongs to.

    Args:
        documents: of one source.
        source: `train`, or the name of a validation text. If that has a validation split of its own, as many
            hub datasets have, this alone counts; it comes first.
        is_split: whether held-out documents of the training source are validation text, or left out.
    """
    has_split = False
    for document in documents:
        if source == "train":
            if is_split or document.split == "train":
                yield document.split, document
        else:
            has_split = has_split or document.split == "validation"
            if not has_split or document.split == "validation":
                yield source, document


def _open_tokens(path: Path, count: dict[str, Any]) -> ValidationText:
    size = count["tokens"] * np.dtype(count["dtype"]).itemsize
    if not path.is_file() or path.stat().st_size != size:
        raise ConfigError("data.cache_dir", f"{path.parent} is damaged; delete that folder and start again")
    tokens = np.memmap(path, dtype=count["dtype"], mode="r")
    return ValidationText(tokens, count["bytes"] / count["tokens"])
