"""Configurations of small corpora."""

from pathlib import Path
from typing import Any

from moe.config import Config, parse_config


def corpus_config(cache_dir: Path, **data: Any) -> Config:
    """Twenty steps of two short samples of bytes, with the keys of the section `data` changed."""
    settings = {"tokenizer": "bytes", "seq_len": 16, "cache_dir": str(cache_dir)} | data
    return parse_config(
        {"data": settings, "train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 20}}
    )
