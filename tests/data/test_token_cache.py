"""Text becomes tokens once, all of it, and the cache knows whether it still fits."""

import json
import os
import time

import numpy as np
import pytest

from moe.config import ConfigError, parse_config
from moe.data.token_cache import cache_folder, prepare_corpus
from tests.support.corpora import corpus_config, documents_of, prepared_folder


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
    parts = decode(prepared, prepared.train.tokens).split("<|endoftext|>")[:-1]
    parts += decode(prepared, prepared.validation.tokens).split("<|endoftext|>")[:-1]
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
    assert 20 * 2 * 16 < len(short.train.tokens) < 20 * 2 * 16 + 1000
    assert np.array_equal(longer.train.tokens[: len(short.train.tokens)], short.train.tokens)
    assert len(longer.train.tokens) > 60 * 2 * 16
    assert np.array_equal(longer.validation.tokens, short.validation.tokens)
    assert longer.fingerprint == short.fingerprint


def stamps_of_contents(cache):
    """When each file was written; some versions of filelock write the empty lock files each time."""
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*") if "locks" not in path.parts}


def test_the_cache_is_reused_and_depends_on_content_and_settings(tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("some words\n" * 200)
    first = prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    stamps = stamps_of_contents(tmp_path / "c")
    again = prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    assert stamps_of_contents(tmp_path / "c") == stamps
    assert again.fingerprint == first.fingerprint
    other = prepare_corpus(corpus_config(tmp_path / "c", source=str(source), tokenizer="bpe:260"))
    source.write_text("some other words\n" * 200)
    changed = prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    assert len({first.fingerprint, other.fingerprint, changed.fingerprint}) == 3


@pytest.mark.parametrize(
    ("key", "value"), [("encoding", "latin-1"), ("on_bad_record", "skip"), ("validation_share", 0.5)]
)
def test_the_same_file_read_in_another_way_is_another_text(tmp_path, key, value):
    (tmp_path / "a.txt").write_text("Grüße\n" * 400, encoding="utf-8")
    settings = {"source": str(tmp_path / "a.txt"), "validation_share": 0.1}
    first = prepare_corpus(corpus_config(tmp_path / "c", **settings))
    other = prepare_corpus(corpus_config(tmp_path / "c", **settings | {key: value}))
    assert first.fingerprint != other.fingerprint
    both = prepare_corpus(corpus_config(tmp_path / "d", **settings | {key: value}))  # a cache of its own
    assert np.array_equal(both.train.tokens, other.train.tokens)
    assert both.fingerprint == other.fingerprint


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_tokenizer_of_another_content_makes_another_text(tmp_path, is_folder):
    """Under the same name; given as a file, or as the folder of a Hugging Face model."""
    (tmp_path / "a.txt").write_text("some words\n" * 200)
    (tmp_path / "t").mkdir()
    given = str(tmp_path / "t" / ("" if is_folder else "tokenizer.json"))
    found = []
    for other in ("bpe:260", "bpe:264"):
        trained = prepare_corpus(
            corpus_config(tmp_path / other, source=str(tmp_path / "a.txt"), tokenizer=other)
        )
        trained.tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
        settings = {"source": str(tmp_path / "a.txt"), "tokenizer": given}
        found.append(prepare_corpus(corpus_config(tmp_path / "c", **settings)))
        assert np.array_equal(found[-1].train.tokens, trained.train.tokens)
    assert found[0].fingerprint != found[1].fingerprint


def test_documents_end_with_the_end_token_and_decode_to_their_text(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"Grüße {i} 日本 🎉 <|endoftext|> inside" for i in range(200)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepared = prepare_corpus(corpus_config(tmp_path / "c", source=str(path), tokenizer="bpe:300"))
    end = prepared.tokenizer.token_to_id(prepared.end_token)
    documents, current = [], []
    for split in (prepared.train.tokens, prepared.validation.tokens):
        for token in split.tolist():
            if token == end:
                documents.append(prepared.tokenizer.decode(current))
                current = []
            else:
                current.append(token)
    assert sorted(documents) == sorted(texts)


def test_bytes_per_token_is_that_of_the_validation_text(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße aus 日本 🎉\n" * 200, encoding="utf-8")
    prepared = prepare_corpus(corpus_config(tmp_path, source=str(tmp_path / "a.txt"), tokenizer="bpe:260"))
    _, validation = documents_of(tmp_path, source=str(tmp_path / "a.txt"))
    ids = prepared.tokenizer.encode(validation.text, add_special_tokens=False).ids
    line = 24  # bytes: two letters take 2, two 3, and one 4
    tokens = len(ids) + 1  # and the end token
    assert prepared.validation.bytes_per_token == validation.text.count("\n") * line / tokens


def test_the_domain_of_every_document_is_kept(tmp_path, text_file):
    config = corpus_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    folder = prepared_folder(tmp_path / "c")
    documents = np.fromfile(folder / "train.documents.bin", dtype=np.int64)
    meta = json.loads((folder / "meta.json").read_text())
    assert documents.tolist() == [0, 0]
    assert meta["splits"]["train"]["domains"] == ["text"]


def test_a_failed_build_leaves_nothing_in_the_cache(tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("too short")
    with pytest.raises(ConfigError, match=r"data.seq_len: 16 is longer than the"):
        prepare_corpus(corpus_config(tmp_path / "c", source=str(source)))
    assert {path.name for path in (tmp_path / "c").iterdir()} <= {"locks", "hashes"}


def test_a_further_validation_text_that_is_missing_is_refused_before_anything_is_tokenized(
    tmp_path, text_file
):
    config = corpus_config(tmp_path / "c", source=str(text_file), extra_validation={"other": "missing.txt"})
    with pytest.raises(ConfigError, match=r"^data.extra_validation: no such file: missing.txt"):
        prepare_corpus(config)
    assert not list((tmp_path / "c").glob("*/meta.json"))


def test_a_damaged_cache_is_refused_by_name(tmp_path, text_file):
    config = corpus_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    folder = prepared_folder(tmp_path / "c")
    (folder / "train.bin").write_bytes(b"short")
    with pytest.raises(ConfigError, match=f"{folder} is damaged; delete"):
        prepare_corpus(config)


def test_validation_text_of_ones_own_leaves_all_of_the_source_for_training(tmp_path):
    source, held_out = tmp_path / "a.txt", tmp_path / "held_out.txt"
    source.write_text("training words\n" * 100)
    held_out.write_text("other words\n" * 30)
    prepared = prepare_corpus(corpus_config(tmp_path / "c", source=str(source), validation=str(held_out)))
    assert decode(prepared, prepared.train.tokens) == source.read_text() + "<|endoftext|>"
    assert decode(prepared, prepared.validation.tokens) == held_out.read_text() + "<|endoftext|>"


def test_of_a_validation_dataset_with_a_validation_split_only_that_is_used(tmp_path):
    import datasets

    tables = {
        split: datasets.Dataset.from_dict({"text": [f"{split} {i} " * 9 for i in range(9)]})
        for split in ("train", "validation")
    }
    datasets.DatasetDict(**tables).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("training words\n" * 100)
    prepared = prepare_corpus(
        corpus_config(tmp_path / "c", source=str(tmp_path / "a.txt"), validation=str(tmp_path / "saved"))
    )
    text = decode(prepared, prepared.validation.tokens)
    assert text.count("<|endoftext|>") == 9
    assert "train" not in text


def test_further_validation_texts_are_tokenized_alike_and_change_nothing_else(tmp_path):
    source, other = tmp_path / "a.txt", tmp_path / "other.jsonl"
    source.write_text("training words\n" * 200)
    other.write_text("".join(json.dumps({"text": f"other words {i}"}) + "\n" for i in range(20)))
    settings = {"source": str(source), "tokenizer": "bpe:260"}
    plain = prepare_corpus(corpus_config(tmp_path / "c", **settings))
    stamps = {path: path.stat().st_mtime_ns for path in prepared_folder(tmp_path / "c").iterdir()}
    both = prepare_corpus(corpus_config(tmp_path / "c", **settings, extra_validation={"other": str(other)}))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert both.fingerprint == plain.fingerprint
    assert both.tokenizer.to_str() == plain.tokenizer.to_str()
    text = "".join(f"other words {i}<|endoftext|>" for i in range(20))
    tokens = both.extra_validation["other"]
    assert decode(both, tokens.tokens) == text
    size = len(text.replace("<|endoftext|>", ""))
    assert tokens.bytes_per_token == size / len(tokens.tokens)


def test_files_that_did_not_change_are_not_read_again(tmp_path):
    source, config = tmp_path / "a.txt", corpus_config(tmp_path / "c", source=str(tmp_path / "a.txt"))
    source.write_text("some words\n" * 200)
    an_hour_ago = time.time() - 3600
    os.utime(source, (an_hour_ago, an_hour_ago))
    first = prepare_corpus(config)
    source.write_text("SOME WORDS\n" * 200)
    os.utime(source, (an_hour_ago, an_hour_ago))
    assert prepare_corpus(config).fingerprint == first.fingerprint
    os.utime(source, (an_hour_ago + 1, an_hour_ago + 1))
    assert prepare_corpus(config).fingerprint != first.fingerprint


def test_a_file_that_has_just_changed_is_read_again(tmp_path):
    """It may change once more within the same tick of the file system's clock."""
    source, config = tmp_path / "a.txt", corpus_config(tmp_path / "c", source=str(tmp_path / "a.txt"))
    source.write_text("some words\n" * 200)
    stamp = source.stat().st_mtime_ns
    first = prepare_corpus(config)
    source.write_text("SOME WORDS\n" * 200)
    os.utime(source, ns=(stamp, stamp))
    assert prepare_corpus(config).fingerprint != first.fingerprint


def test_cache_folder_follows_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(parse_config({}).data) == tmp_path / "gatework"
