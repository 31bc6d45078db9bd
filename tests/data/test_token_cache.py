"""Text becomes tokens once, all of it, and the cache knows whether it still fits."""

import json

import numpy as np
import pytest

from moe.config import ConfigError, parse_config
from moe.data.corpus import open_corpus
from moe.data.token_cache import cache_folder, prepare_corpus
from tests.support.corpora import corpus_config


def decode(prepared, split):
    return prepared.tokenizer.decode(split.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_records_of_every_local_format_become_the_same_tokens(tmp_path, suffix):
    import datasets

    texts = [f'record {i}, with a comma and a "quote"\nand a second line' for i in range(60)]
    table = datasets.Dataset.from_dict({"id": list(range(60)), "body": texts})
    path = tmp_path / f"data.{suffix}"
    writer = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
    writer(path)
    prepared = prepare_corpus(corpus_config(tmp_path / "cache", source=str(path), text_field="body"))
    parts = decode(prepared, prepared.train).split("<|endoftext|>")[:-1]
    parts += decode(prepared, prepared.validation).split("<|endoftext|>")[:-1]
    assert sorted(parts) == sorted(texts)


def test_a_stream_reads_only_what_the_run_needs_and_a_longer_run_keeps_the_prefix(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 40}) for i in range(2000)))
    settings = {"source": str(path), "streaming": True}
    short = prepare_corpus(corpus_config(tmp_path / "c", **settings))
    config = corpus_config(tmp_path / "c", **settings)
    longer = prepare_corpus(
        config.model_copy(update={"train": config.train.model_copy(update={"steps": 60})})
    )
    assert 20 * 2 * 16 < len(short.train) < 20 * 2 * 16 + 1000
    assert np.array_equal(longer.train[: len(short.train)], short.train)
    assert len(longer.train) > 60 * 2 * 16
    assert np.array_equal(longer.validation, short.validation)
    assert longer.fingerprint == short.fingerprint


def test_the_cache_is_reused_and_depends_on_content_and_settings(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("some words\n" * 200)
    first = prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    stamp = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    again = prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == stamp
    assert again.fingerprint == first.fingerprint
    other = prepare_corpus(corpus_config(tmp_path / "c", source=str(source), tokenizer="bpe:260"))
    source.write_text("some other words\n" * 200)
    changed = prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    assert len({first.fingerprint, other.fingerprint, changed.fingerprint}) == 3


def test_documents_end_with_the_end_token_and_decode_to_their_text(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"Grüße {i} 日本 🎉 <|endoftext|> inside" for i in range(200)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepared = prepare_corpus(corpus_config(tmp_path / "c", source=str(path), tokenizer="bpe:300"))
    end = prepared.tokenizer.token_to_id(prepared.end_token)
    documents, current = [], []
    for split in (prepared.train, prepared.validation):
        for token in split.tolist():
            if token == end:
                documents.append(prepared.tokenizer.decode(current))
                current = []
            else:
                current.append(token)
    assert sorted(documents) == sorted(texts)


def test_bytes_per_token_is_that_of_the_validation_text(tmp_path, text_file):
    prepared = prepare_corpus(corpus_config(tmp_path, source=str(text_file)))
    _, validation = open_corpus(corpus_config(tmp_path, source=str(text_file)).data).read()
    size = len(validation.text.encode())
    assert prepared.validation_bytes_per_token == size / (size + 1)  # one end token


def test_the_domain_of_every_document_is_kept(tmp_path, text_file):
    config = corpus_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    (folder,) = (tmp_path / "c").iterdir()
    starts = np.load(folder / "train.documents.npy")
    meta = json.loads((folder / "meta.json").read_text())
    assert starts.tolist() == [[0, 0]]
    assert meta["train"]["domains"] == ["text"]


def test_a_failed_build_leaves_nothing_in_the_cache(tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("too short")
    with pytest.raises(ConfigError, match=r"data.seq_len: 16 is longer than the"):
        prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    assert list((tmp_path / "c").iterdir()) == []


def test_a_damaged_cache_is_refused_by_name(tmp_path, text_file):
    config = corpus_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    (folder,) = (tmp_path / "c").iterdir()
    (folder / "train.bin").write_bytes(b"short")
    with pytest.raises(ConfigError, match=f"{folder} is damaged; delete"):
        prepare_corpus(config)


def test_cache_folder_follows_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(parse_config({})) == tmp_path / "gatework"
