import json

import numpy as np
import pytest
import tokenizers

from moe.config import ConfigError, parse_config
from moe.data import corpus, tokens
from moe.data.corpus import open_corpus
from moe.data.samples import num_samples, read_samples, sample_ids, validation_ids
from moe.data.token_cache import prepare_corpus
from moe.data.tokenizer import vocabulary_size


def make_config(cache_dir, **data):
    settings = {"tokenizer": "bytes", "seq_len": 16, "cache_dir": str(cache_dir)} | data
    return parse_config(
        {"data": settings, "train": {"global_batch_size": 2, "micro_batch_size": 1, "steps": 20}}
    )


def decode(prepared, split):
    return prepared.tokenizer.decode(split.tolist(), skip_special_tokens=False)


def test_stdlib_holds_code_and_prose_split_by_file_without_overlap():
    documents = list(open_corpus(parse_config({}).data).read())
    train = {document.text for document in documents if document.split == "train"}
    validation = {document.text for document in documents if document.split == "validation"}
    assert not train & validation
    share = sum(map(len, validation)) / sum(map(len, train | validation))
    assert 0.02 < share < 0.10
    assert {document.domain for document in documents} == {"code", "prose"}
    assert any("def dataclass(" in text for text in train | validation)
    assert any(
        "for_stmt" in text and document.domain == "prose"
        for document in documents
        for text in [document.text]
    )


def test_the_side_of_a_file_is_fixed_by_its_name_alone():
    held_out = [name for name in (f"file{i}.py" for i in range(60)) if corpus._split(name) == "validation"]
    assert held_out == ["file3.py", "file6.py", "file15.py", "file32.py", "file33.py", "file46.py"]
    sides = [corpus._split(f"file{i}.py") for i in range(4000)]
    assert 0.035 < sides.count("validation") / 4000 < 0.065


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_records_of_every_local_format_become_the_same_tokens(tmp_path, suffix):
    import datasets

    texts = [f'record {i}, with a comma and a "quote"\nand a second line' for i in range(60)]
    table = datasets.Dataset.from_dict({"id": list(range(60)), "body": texts})
    path = tmp_path / f"data.{suffix}"
    writer = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
    writer(path)
    prepared = prepare_corpus(make_config(tmp_path / "cache", source=str(path), text_field="body"))
    parts = decode(prepared, prepared.train).split("<|endoftext|>")[:-1]
    parts += decode(prepared, prepared.validation).split("<|endoftext|>")[:-1]
    assert sorted(parts) == sorted(texts)


def test_globs_and_folders_read_every_file(tmp_path):
    for i in range(25):
        (tmp_path / f"part{i}.txt").write_text(f"text of part {i} " * 20)
    for source in (tmp_path, tmp_path / "*.txt"):
        documents = list(open_corpus(make_config(tmp_path, source=str(source)).data).read())
        assert len(documents) == 25
        assert {document.split for document in documents} == {"train", "validation"}


def test_names_decide_the_split_so_they_are_part_of_the_fingerprint(tmp_path):
    found = []
    for prefix in ("a", "b"):
        folder = tmp_path / prefix
        folder.mkdir()
        for i in range(60):
            (folder / f"{prefix}{i:02}.txt").write_text(f"the same text {i} " * 20)
        source = open_corpus(make_config(tmp_path, source=str(folder)).data)
        found.append((source.fingerprint, [document.split for document in source.read()]))
    assert found[0][1] != found[1][1]
    assert found[0][0] != found[1][0]


def test_files_of_one_name_in_many_folders_are_split_and_copies_are_read_once(tmp_path):
    for i in range(60):
        (tmp_path / f"p{i}").mkdir()
        (tmp_path / f"p{i}" / "README.md").write_text(f"readme {i % 50} " * 20)
    documents = list(open_corpus(make_config(tmp_path, source=str(tmp_path)).data).read())
    assert len(documents) == len({document.text for document in documents}) == 50
    assert {document.split for document in documents} == {"train", "validation"}


@pytest.mark.parametrize(
    "text",
    ["word " * 4000, "header\n" + "word " * 4000, "line\n" * 4000],
    ids=["one line", "header", "lines"],
)
def test_the_tail_is_a_twentieth_with_or_without_newlines(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    train, validation = open_corpus(make_config(tmp_path, source=str(tmp_path / "t.txt")).data).read()
    assert train.text + validation.text == text
    assert 0.03 < len(validation.text) / len(text) < 0.16


def test_suffixes_are_read_in_any_case_and_ndjson_is_json(tmp_path):
    for name in ("UP.JSONL", "x.ndjson"):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(50)))
        documents = list(open_corpus(make_config(tmp_path, source=str(tmp_path / name)).data).read())
        assert documents[0].text == "record 0"


def test_a_tokenizers_truncation_and_padding_are_not_applied(tmp_path, text_file):
    plain = prepare_corpus(make_config(tmp_path / "c", source=str(text_file)))
    tokenizer = plain.tokenizer
    tokenizer.enable_truncation(100)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "t.json"))
    prepared = prepare_corpus(
        make_config(tmp_path / "c", source=str(text_file), tokenizer=str(tmp_path / "t.json"))
    )
    assert np.array_equal(prepared.train, plain.train)


def test_a_vocabulary_with_gaps_gets_the_rows_of_its_largest_id(tmp_path, text_file):
    model = tokenizers.models.WordLevel({"<unk>": 0, "</s>": 900, "def": 70000}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    prepared = prepare_corpus(
        make_config(tmp_path / "c", source=str(text_file), tokenizer=str(tmp_path / "t.json"))
    )
    assert vocabulary_size(prepared.tokenizer) == 70001
    assert set(prepared.train.tolist()) == {0, 900, 70000}
    assert prepared.train.dtype == np.uint32


def test_one_text_file_gives_its_tail_to_validation(tmp_path, text_file):
    train, validation = open_corpus(make_config(tmp_path, source=str(text_file)).data).read()
    assert train.text + validation.text == text_file.read_text()
    assert (train.split, validation.split) == ("train", "validation")
    assert 0.04 < len(validation.text) / len(train.text) < 0.07


def test_a_hub_dataset_is_read_by_name_with_its_own_validation_split(monkeypatch, tmp_path):
    """The hub itself is out of reach; `datasets` serves the same call from a local folder."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "someone" / "poems"
    folder.mkdir(parents=True)
    for split, count in (("train", 30), ("validation", 5)):
        rows = [json.dumps({"text": f"{split} poem {i} " * 5}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))

    class Hub:
        def dataset_info(self, name, timeout):
            assert name == "someone/poems"
            return type("Info", (), {"sha": "abc123"})

    real_load = datasets.load_dataset
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "validation"])
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, split, streaming, **_: real_load(str(folder), split=split, streaming=streaming),
    )
    documents = list(open_corpus(make_config(tmp_path, source="someone/poems").data).read())
    assert sum(document.split == "validation" for document in documents) == 5
    assert all(document.text.startswith(document.split) for document in documents)
    assert len(documents) == 35


def test_a_stream_reads_only_what_the_run_needs_and_a_longer_run_keeps_the_prefix(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i} " * 40}) for i in range(2000)))
    settings = {"source": str(path), "streaming": True}
    short = prepare_corpus(make_config(tmp_path / "c", **settings))
    config = make_config(tmp_path / "c", **settings)
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
    first = prepare_corpus(make_config(tmp_path / "c", source=str(source)))
    stamp = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    again = prepare_corpus(make_config(tmp_path / "c", source=str(source)))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == stamp
    assert again.fingerprint == first.fingerprint
    other = prepare_corpus(make_config(tmp_path / "c", source=str(source), tokenizer="bpe:260"))
    source.write_text("some other words\n" * 200)
    changed = prepare_corpus(make_config(tmp_path / "c", source=str(source)))
    assert len({first.fingerprint, other.fingerprint, changed.fingerprint}) == 3


def test_documents_end_with_the_end_token_and_decode_to_their_text(tmp_path):
    path = tmp_path / "d.jsonl"
    texts = [f"Grüße {i} 日本 🎉 <|endoftext|> inside" for i in range(200)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepared = prepare_corpus(make_config(tmp_path / "c", source=str(path), tokenizer="bpe:300"))
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
    prepared = prepare_corpus(make_config(tmp_path, source=str(text_file)))
    _, validation = open_corpus(make_config(tmp_path, source=str(text_file)).data).read()
    size = len(validation.text.encode())
    assert prepared.validation_bytes_per_token == size / (size + 1)  # one end token


def test_the_domain_of_every_document_is_kept(tmp_path, text_file):
    config = make_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    (folder,) = (tmp_path / "c").iterdir()
    starts = np.load(folder / "train.documents.npy")
    meta = json.loads((folder / "meta.json").read_text())
    assert starts.tolist() == [[0, 0]]
    assert meta["train"]["domains"] == ["text"]


def test_any_tokenizer_json_can_be_used_and_its_end_token_named(tmp_path, text_file):
    model = tokenizers.models.WordLevel({"<unk>": 0, "STOP": 1, "def": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    settings = {"source": str(text_file), "tokenizer": str(tmp_path / "t.json")}
    with pytest.raises(ConfigError, match=r"data.end_token: the tokenizer has no token"):
        prepare_corpus(make_config(tmp_path / "c", **settings))
    prepared = prepare_corpus(make_config(tmp_path / "c", **settings, end_token="STOP"))
    assert set(prepared.train.tolist()) == {0, 1, 2}


def test_a_failed_build_leaves_nothing_in_the_cache(tmp_path):
    source = tmp_path / "short.txt"
    source.write_text("too short")
    with pytest.raises(ConfigError, match=r"data.seq_len: 16 is longer than the"):
        prepare_corpus(make_config(tmp_path / "c", source=str(source)))
    assert list((tmp_path / "c").iterdir()) == []


def test_a_damaged_cache_is_refused_by_name(tmp_path, text_file):
    config = make_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    (folder,) = (tmp_path / "c").iterdir()
    (folder / "train.bin").write_bytes(b"short")
    with pytest.raises(ConfigError, match=f"{folder} is damaged; delete"):
        prepare_corpus(config)


def test_every_epoch_visits_every_sample_once_in_another_order():
    drawn = np.concatenate([sample_ids(7, step, 10, 25, shuffle=True) for step in range(5)])
    first, second = drawn[:25], drawn[25:]
    assert sorted(first) == sorted(second) == list(range(25))
    assert first.tolist() != second.tolist()


def test_sample_ids_are_a_function_of_seed_and_step_alone():
    assert sample_ids(1, 3, 4, 1000, True).tolist() == [
        809,
        48,
        583,
        262,
    ]  # a saved run is resumed with these
    both = np.concatenate([sample_ids(1, step, 8, 1000, True) for step in (10, 11)])
    assert np.array_equal(sample_ids(1, 5, 16, 1000, True), both)  # step 5 of 16 is steps 10 and 11 of 8
    assert not np.array_equal(sample_ids(1, 3, 16, 1000, True), sample_ids(2, 3, 16, 1000, True))
    assert sample_ids(0, 2, 4, 100, shuffle=False).tolist() == [8, 9, 10, 11]


def test_samples_tile_the_corpus_and_share_one_token():
    text = np.arange(101, dtype=np.uint16)
    assert num_samples(text, 10) == 10
    samples = read_samples(text, np.array([0, 9]), 10)
    assert samples.tolist() == [list(range(0, 11)), list(range(90, 101))]


def test_validation_samples_are_spread_over_the_split():
    assert validation_ids(101, 5).tolist() == [0, 25, 50, 75, 100]
    assert validation_ids(3, 8).tolist() == [0, 1, 2]
    assert len(set(validation_ids(1000, 128).tolist())) == 128


def test_cache_folder_follows_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tokens.cache_folder(parse_config({})) == tmp_path / "gatework"
