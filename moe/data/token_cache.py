"""The tokenized corpus of a run: opened from the cache, or built there first.

It is a folder of the cache, named by a hash of the content and of every setting that shapes its tokens. It
appears under its name when it is complete.
"""

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe.config import Config, ConfigError, DataConfig, changed
from moe.data.amounts import refuse_too_little
from moe.data.build_lock import alone
from moe.data.building import Build
from moe.data.chunks import Source
from moe.data.corpus import open_corpus
from moe.data.mixture import samples_drawn
from moe.data.text import Text, open_text
from moe.data.tokenizer import find_revision, read_tokenizer, vocabulary_size

_FORMAT, _LAYOUT = 2, 2  # of the tokens; of the files of the cache


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready for training.

    Attributes:
        fingerprint: hash of content and settings; equal fingerprints mean equal tokens in the same order,
            of which a stream may hold more or fewer.
        tokenizer: of these tokens.
        end_token: the token after each document.
        train: training text.
        validation: held-out text, that of all sources together.
        extra_validation: the held-out text of each of several sources, and the texts of
            `data.extra_validation`, by name.
        revisions: `data.revision`, `data.source_revisions` and `data.tokenizer_revision` as found on the hub.
    """

    fingerprint: str
    tokenizer: Tokenizer
    end_token: str
    train: Text
    validation: Text
    extra_validation: dict[str, Text]
    revisions: dict[str, Any]


def prepare_corpus(config: Config) -> TokenizedCorpus:
    """Tokenize the corpus of a configuration, or open it from the cache.

    Raises:
        ConfigError: anything wrong with a source, the tokenizer, the cache folder or the amount of text;
            no part of it is left in the cache then.
    """
    build = plan_build(config)
    others = [_open_source(build.config, name, (name,)) for name in config.data.extra_validation]
    texts, tokenizer, end = _built(build)
    names, extra = config.data.sources, {}
    if config.data.validation is None:
        extra = {name: texts["validation"].of_source(name) for name in names}
    for source in others:
        extra |= _built(_plan_extra(build.config, source, tokenizer, end))[0]
    commits = {source.name: source.corpus.revision for source in build.sources}
    return TokenizedCorpus(
        fingerprint=build.fingerprint,
        tokenizer=tokenizer,
        end_token=end,
        train=texts["train"],
        validation=texts["validation"],
        extra_validation=extra,
        revisions={
            "data.revision": None if names else commits["train"],
            "data.source_revisions": {name: commits[name] for name in names if commits[name] is not None},
            "data.tokenizer_revision": build.config.data.tokenizer_revision,
        },
    )


def plan_build(config: Config) -> Build:
    """What is to be tokenized for a run, and where it goes.

    Raises:
        ConfigError: a source or the tokenizer does not exist, or cannot be read.
    """
    revision = find_revision(config.data.tokenizer, config.data.tokenizer_revision)
    config = changed(config, {"data.tokenizer_revision": revision})
    data = config.data
    files = ("train", "validation") if data.validation is None else ("train",)
    sources = [_open_source(config, name, files) for name in data.sources or ["train"]]
    if data.validation is not None:
        sources.append(_open_source(config, "validation", ("validation",)))
    content = [source.corpus.fingerprint for source in sources]
    settings = _settings(data, content) | {"tokenizer": _tokenizer_identity(data)}
    if data.sources:
        settings["sources"] = [[name, source.text_field] for name, source in data.sources.items()]
    return _plan(config, sources, settings)


def cache_folder(data: DataConfig) -> Path:
    """Where prepared corpora live."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gatework"


def _plan_extra(config: Config, source: Source, tokenizer: Tokenizer, end: str) -> Build:
    """A text of `data.extra_validation`."""
    settings = _settings(config.data, [source.corpus.fingerprint])
    settings |= {"tokenizer": tokenizer.to_str(), "end_token": end}
    return _plan(config, [source], settings, tokenizer)


def _plan(
    config: Config, sources: list[Source], settings: dict[str, Any], tokenizer: Tokenizer | None = None
) -> Build:
    cache = cache_folder(config.data)
    limits: dict[str, Any] = {source.name: source.limits for source in sources if source.limits}
    if not config.data.sources:
        limits = {file: limit for of_source in limits.values() for file, limit in of_source.items()}
    return Build(
        config=config,
        sources=sources,
        fingerprint=_hash(settings),
        folder=cache / _hash({**settings, "limits": limits, "layout": _LAYOUT}),
        work=cache / f"{_hash({**settings, 'layout': _LAYOUT})}-chunks",
        tokenizer=tokenizer,
    )


def _open_source(config: Config, name: str, files: tuple[str, ...]) -> Source:
    """The source of this name: one of `data.sources`, `train`, `validation`, or of `data.extra_validation`.

    Nothing is held out of a source of validation text, or beside one.
    """
    data = config.data
    changes: dict[str, Any] = {}
    if name in data.sources:
        own = data.sources[name]
        key, commit = f"data.sources.{name}.source", data.source_revisions.get(name)
        changes = {"source": own.source, "subset": own.subset, "revision": commit}
        changes["text_field"] = own.text_field or data.text_field
    elif name == "train":
        key = "data.source"
    elif name == "validation" and files == ("validation",):
        key, changes = "data.validation", {"source": data.validation}
    else:
        key, changes = "data.extra_validation", {"source": data.extra_validation[name]}
    if "validation" not in files or "train" not in files:
        changes["validation_share"] = 0.0
    try:
        corpus = open_corpus(data.model_copy(update=changes), cache_folder(data))
    except ConfigError as error:
        raise error if error.key != "data.source" else ConfigError(key, error.message) from None
    limits = {file: _token_limit(config, name, file) for file in files} if data.streaming else {}
    return Source(name, corpus, files, limits, skips_bad=data.on_bad_record == "skip")


def _token_limit(config: Config, source: str, file: str) -> int:
    """How many tokens of a stream go into a token file."""
    data, train = config.data, config.train
    if file != "train":
        return train.eval_batches * train.global_batch_size * data.seq_len + 1
    samples = train.steps * train.global_batch_size
    if data.sources:
        samples = samples_drawn(config, train.steps)[source]
    window = data.shuffle_buffer or 1
    return math.ceil(samples / window) * window * data.seq_len + 1


def _settings(data: DataConfig, content: list[str]) -> dict[str, Any]:
    """All that shapes the tokens, besides the tokenizer.

    Keys that came later count where they differ from their defaults, so that older runs can be resumed.
    """
    settings = {
        "format": _FORMAT,
        "content": content[0],
        "end_token": data.end_token,
        "text_field": data.text_field,
    }
    later = data.model_dump(include={"encoding", "on_bad_record", "validation_share"})
    settings |= {key: value for key, value in later.items() if value != DataConfig.model_fields[key].default}
    if data.sources:
        return settings | {"content": content}
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


def _built(build: Build) -> tuple[dict[str, Text], Tokenizer, str]:
    """The texts of a build by name, made or opened; their tokenizer, and their end token."""
    config, folder = build.config, build.folder
    if not build.is_published():
        with alone(folder.parent, folder.name, config.data.cache_timeout_s):
            if not build.is_published():
                build.publish()
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = read_tokenizer(folder / "tokenizer.json", "data.cache_dir")
    refuse_too_little(config, meta, vocabulary_size(tokenizer))
    if meta["bad_records"]:
        count, first = meta["bad_records"], meta["first_bad"]
        print(f"data.on_bad_record=skip left out {count} records, first {first}", file=sys.stderr)
    texts = {name: open_text(folder, name, count) for name, count in meta["splits"].items()}
    return texts, tokenizer, meta["end_token"]
