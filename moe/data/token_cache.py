"""Tokenize a corpus once into memory-mapped files.

A prepared corpus is a folder of the cache, named by a hash of the content and of every setting that shapes
its tokens. It is written under a temporary name and renamed, so it is complete or not there.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from moe.config import Config, ConfigError
from moe.data.corpus import Corpus, Document, Split, open_corpus
from moe.data.tokenizer import end_token, load_tokenizer, read_tokenizer, vocabulary_size

_FORMAT = 2
T = TypeVar("T")
_SPLITS: tuple[Split, Split] = ("train", "validation")


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus ready for training.

    Attributes:
        fingerprint: hash of content and settings; equal fingerprints mean equal tokens in the same order,
            of which a stream may hold more or fewer.
        tokenizer: of these tokens.
        end_token: the token after each document.
        train: (n,) uint16 or uint32, memory-mapped, documents in order, each followed by the end token.
        validation: the same for the validation split.
        validation_bytes_per_token: UTF-8 bytes of the validation documents over their tokens, end tokens
            included: what turns nats per token into bits per byte.
    """

    fingerprint: str
    tokenizer: Tokenizer
    end_token: str
    train: np.ndarray
    validation: np.ndarray
    validation_bytes_per_token: float


def prepare_corpus(config: Config) -> TokenizedCorpus:
    """Tokenize the corpus of a configuration, or open it from the cache.

    Raises:
        ConfigError: anything wrong with the source, the tokenizer, the cache folder or the amount of text;
            nothing is left in the cache then.
    """
    corpus = open_corpus(config.data)
    settings = {
        "format": _FORMAT,
        "content": corpus.fingerprint,
        "tokenizer": _tokenizer_identity(config.data.tokenizer),
        "end_token": config.data.end_token,
        "text_field": config.data.text_field,
    }
    fingerprint = _hash(settings)
    folder = cache_folder(config) / _hash({**settings, "limits": _token_limits(config)})
    if not (folder / "meta.json").exists():
        _build(config, corpus, folder)
    return _open(config, folder, fingerprint)


def cache_folder(config: Config) -> Path:
    """Where prepared corpora live."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gatework"


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_identity(spec: str) -> str:
    path = Path(spec).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else spec


def _token_limits(config: Config) -> dict[Split, int | None]:
    """How many tokens to read of each split: all of them, unless the corpus is a stream."""
    if not config.data.streaming:
        return {"train": None, "validation": None}
    per_batch = config.train.global_batch_size * config.data.seq_len
    return {
        "train": config.train.steps * per_batch + 1,
        "validation": config.train.eval_batches * per_batch + 1,
    }


def _build(config: Config, corpus: Corpus, folder: Path) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError("data.cache_dir", f"cannot write to {folder.parent} ({error.strerror})") from None
    try:
        training_texts = _with_progress(
            (document.text for document in corpus.read() if document.split == "train"),
            "training the tokenizer",
        )
        tokenizer = load_tokenizer(config.data.tokenizer, training_texts)
        token = end_token(tokenizer, config.data.end_token)
        config.resolve(vocabulary_size(tokenizer))  # refuses a vocabulary that does not fit
        tokenizer.save(str(scratch / "tokenizer.json"))
        counts = _write_tokens(corpus.read(), tokenizer, token, _token_limits(config), scratch)
        meta = {"end_token": token, **counts}
        _check_enough(config, meta)
        (scratch / "meta.json").write_text(json.dumps(meta))
        try:
            scratch.rename(folder)
        except OSError:  # another process finished the same corpus first
            if not (folder / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_tokens(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    end: str,
    limits: dict[Split, int | None],
    scratch: Path,
) -> dict[Split, dict[str, Any]]:
    """Write each split's tokens, and the start and domain of each of its documents."""
    dtype = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32
    end_id = tokenizer.token_to_id(end)
    tokenizer.encode_special_tokens = True  # a document that spells out the end token does not end there
    counts: dict[Split, dict[str, int]] = {split: {"tokens": 0, "bytes": 0} for split in _SPLITS}
    starts: dict[Split, list[tuple[int, int]]] = {split: [] for split in _SPLITS}
    domains: list[str] = []
    files = {split: (scratch / f"{split}.bin").open("wb") for split in _SPLITS}

    def full(split: Split) -> bool:
        limit = limits[split]
        return limit is not None and counts[split]["tokens"] >= limit

    documents = _with_progress(documents, "tokenizing")
    for batch in iter(lambda: list(islice(documents, 256)), []):
        wanted = [document for document in batch if document.text.strip() and not full(document.split)]
        texts = [document.text for document in wanted]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for document, encoding in zip(wanted, encodings, strict=True):
            if full(document.split):
                continue
            if document.domain not in domains:
                domains.append(document.domain)
            count = counts[document.split]
            starts[document.split].append((count["tokens"], domains.index(document.domain)))
            ids = np.array([*encoding.ids, end_id], dtype=dtype)
            files[document.split].write(ids.tobytes())
            count["tokens"] += len(ids)
            count["bytes"] += len(document.text.encode(errors="surrogatepass"))
        if all(full(split) for split in _SPLITS):
            break

    for split in _SPLITS:
        files[split].flush()
        os.fsync(files[split].fileno())
        files[split].close()
        np.save(scratch / f"{split}.documents.npy", np.array(starts[split], dtype=np.int64).reshape(-1, 2))
    return {split: {**counts[split], "dtype": np.dtype(dtype).name, "domains": domains} for split in _SPLITS}


def _with_progress(items: Iterable[T], what: str) -> Iterator[T]:
    yield from tqdm(items, desc=what, unit=" documents", disable=None, leave=False)


def _check_enough(config: Config, meta: dict[str, Any]) -> None:
    seq_len = config.data.seq_len
    if meta["train"]["tokens"] + meta["validation"]["tokens"] == 0:
        raise ConfigError("data.source", f"{config.data.source} holds no text")
    for split in _SPLITS:
        tokens = meta[split]["tokens"]
        if tokens == 0:
            problem = f"{config.data.source} has no document in the {split} split"
            raise ConfigError("data.source", f"{problem}; give more documents")
        if tokens <= seq_len:
            problem = f"{seq_len} is longer than the {split} text of {config.data.source} ({tokens} tokens)"
            raise ConfigError("data.seq_len", f"{problem}; lower it or give more text")


def _open(config: Config, folder: Path, fingerprint: str) -> TokenizedCorpus:
    meta = json.loads((folder / "meta.json").read_text())
    _check_enough(config, meta)
    tokens: dict[Split, np.ndarray] = {}
    for split in _SPLITS:
        path, entry = folder / f"{split}.bin", meta[split]
        size = entry["tokens"] * np.dtype(entry["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise ConfigError("data.cache_dir", f"{folder} is damaged; delete that folder and start again")
        tokens[split] = np.memmap(path, dtype=entry["dtype"], mode="r")
    validation = meta["validation"]
    return TokenizedCorpus(
        fingerprint=fingerprint,
        tokenizer=read_tokenizer(folder / "tokenizer.json", "data.cache_dir"),
        end_token=meta["end_token"],
        train=tokens["train"],
        validation=tokens["validation"],
        validation_bytes_per_token=validation["bytes"] / validation["tokens"],
    )
