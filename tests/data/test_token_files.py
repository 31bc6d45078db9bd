"""Tokenizing takes bounded memory, and pieces of a text join as one document."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe.data.files import PIECE
from moe.data.token_cache import prepare_corpus
from tests.support.corpora import corpus_config, prepared_folder
from tests.support.memory_probe import resident
from tests.support.ranks import run_ranks


def test_a_text_in_pieces_is_one_document(tmp_path):
    texts = ["word " * PIECE, "short", "x" * (PIECE + 1), "y" * PIECE]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "held_out.txt").write_text("words " * 100)
    prepared = prepare_corpus(
        corpus_config(tmp_path / "c", source=str(path), validation=str(tmp_path / "held_out.txt"))
    )
    documents = np.fromfile(prepared_folder(tmp_path / "c") / "train.documents.bin", np.int64).reshape(-1, 2)
    lengths = [len(text) + 1 for text in texts]  # bytes, and the end token
    assert documents[:, 0].tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert len(prepared.train.tokens) == sum(lengths)
    decoded = prepared.tokenizer.decode(prepared.train.tokens.tolist(), skip_special_tokens=False)
    assert decoded == "".join(text + "<|endoftext|>" for text in texts)


def growth_of_memory(source: str, cache: str) -> int:
    """Bytes that tokenizing takes at its peak."""
    small = Path(cache) / "small.txt"
    small.write_text("some words\n" * 200)
    prepare_corpus(corpus_config(Path(cache) / "c", source=str(small)))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    prepare_corpus(corpus_config(Path(cache) / "c", source=source))
    return resident("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one.txt", "one.jsonl", "array.json"])
def test_memory_does_not_grow_with_the_text(tmp_path, name):
    text = "".join(f"line {i} of a text that is long\n" for i in range(400_000))  # 13 MB
    size = {"one.txt": len(text), "one.jsonl": 2**18 + 9, "array.json": 1000}[name]
    records = [{"text": text[at : at + size]} for at in range(0, len(text), size)]
    content = {
        "one.txt": text,
        "one.jsonl": "\n".join(map(json.dumps, records)),
        "array.json": json.dumps(records),
    }
    (tmp_path / name).write_text(content[name])
    (growth,) = run_ranks(1, growth_of_memory, str(tmp_path / name), str(tmp_path))
    assert growth < 300 * 2**20
