"""Configurations of small corpora."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe.config import Config, parse_config
from moe.data.corpus import Document, open_corpus
from moe.data.records import BadRecord


def corpus_config(cache_dir: Path, **data: Any) -> Config:
    """Twenty steps of two short samples of bytes, with the keys of the section `data` changed."""
    settings = {"tokenizer": "bytes", "seq_len": 16, "cache_dir": str(cache_dir)} | data
    return parse_config(
        {"data": settings, "train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 20}}
    )


def read_source(cache_dir: Path, **data: Any) -> Iterator[Document | BadRecord]:
    """The documents of a source, with these keys of the section `data`."""
    return open_corpus(corpus_config(cache_dir, **data).data, cache_dir).read()


def documents_of(cache_dir: Path, **data: Any) -> list[Document]:
    """The same where no record is bad."""
    documents = list(read_source(cache_dir, **data))
    assert all(isinstance(document, Document) for document in documents), documents
    return [document for document in documents if isinstance(document, Document)]


def prepared_folder(cache: Path) -> Path:
    """The folder of the only corpus in a cache."""
    (found,) = cache.glob("*/meta.json")
    return found.parent
