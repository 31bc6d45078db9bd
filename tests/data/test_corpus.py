"""Where text comes from, and on which side of the split each document is."""

import json

import pytest

from moe.data.corpus import open_corpus, split_of
from tests.support.corpora import corpus_config, documents_of


def test_stdlib_holds_code_and_prose_split_by_file_without_overlap(tmp_path):
    documents = documents_of(tmp_path, source="stdlib")
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
    held_out = [name for name in (f"file{i}.py" for i in range(60)) if split_of(name, 0.05) == "validation"]
    assert held_out == ["file3.py", "file6.py", "file15.py", "file32.py", "file33.py", "file46.py"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3, 0.73])
def test_the_held_out_share_is_the_one_that_was_asked_for_and_a_larger_one_holds_the_smaller(share):
    names = [f"file{i}.py" for i in range(40_000)]
    held_out = {name for name in names if split_of(name, share) == "validation"}
    assert abs(len(held_out) / 40_000 - share) < 0.01
    assert held_out <= {name for name in names if split_of(name, share + 0.1) == "validation"}


def test_globs_and_folders_read_every_file(tmp_path):
    for i in range(25):
        (tmp_path / f"part{i}.txt").write_text(f"text of part {i} " * 20)
    for source in (tmp_path, tmp_path / "*.txt"):
        documents = list(documents_of(tmp_path, source=str(source)))
        assert len(documents) == 25
        assert {document.split for document in documents} == {"train", "validation"}


def test_names_decide_the_split_so_they_are_part_of_the_fingerprint(tmp_path):
    found = []
    for prefix in ("a", "b"):
        folder = tmp_path / prefix
        folder.mkdir()
        for i in range(60):
            (folder / f"{prefix}{i:02}.txt").write_text(f"the same text {i} " * 20)
        splits = [document.split for document in documents_of(tmp_path, source=str(folder))]
        data = corpus_config(tmp_path, source=str(folder)).data
        found.append((open_corpus(data, tmp_path).fingerprint, splits))
    assert found[0][1] != found[1][1]
    assert found[0][0] != found[1][0]


def test_a_folder_that_moves_keeps_its_split_and_its_fingerprint(tmp_path):
    found = []
    for place in ("here", "there/below"):
        folder = tmp_path / place / "texts"
        folder.mkdir(parents=True)
        for i in range(60):
            (folder / f"{i:02}.txt").write_text(f"text {i} " * 20)
        source = open_corpus(corpus_config(tmp_path, source=str(folder)).data, tmp_path)
        splits = [document.split for document in documents_of(tmp_path, source=str(folder))]
        found.append((source.fingerprint, splits))
    assert found[0] == found[1]


def test_files_of_one_name_in_many_folders_are_split_and_copies_are_read_once(tmp_path):
    for i in range(60):
        (tmp_path / f"p{i}").mkdir()
        (tmp_path / f"p{i}" / "README.md").write_text(f"readme {i % 50} " * 20)
    documents = list(documents_of(tmp_path, source=str(tmp_path)))
    assert len(documents) == len({document.text for document in documents}) == 50
    assert {document.split for document in documents} == {"train", "validation"}


@pytest.mark.parametrize(
    "text",
    ["word " * 4000, "header\n" + "word " * 4000, "line\n" * 4000],
    ids=["one line", "header", "lines"],
)
def test_the_tail_is_a_twentieth_with_or_without_newlines(tmp_path, text):
    (tmp_path / "t.txt").write_text(text)
    train, validation = documents_of(tmp_path, source=str(tmp_path / "t.txt"))
    assert train.text + validation.text == text
    assert 0.03 < len(validation.text) / len(text) < 0.16


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_tail_is_the_share_that_was_asked_for(tmp_path, share):
    (tmp_path / "t.txt").write_text("line\n" * 40_000)
    _, validation = documents_of(tmp_path, source=str(tmp_path / "t.txt"), validation_share=share)
    assert len(validation.text) == pytest.approx(share * 200_000, abs=5)


def test_suffixes_are_read_in_any_case_and_ndjson_is_json(tmp_path):
    for name in ("UP.JSONL", "x.ndjson"):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(50)))
        documents = list(documents_of(tmp_path, source=str(tmp_path / name)))
        assert documents[0].text == "record 0"


def test_one_text_file_gives_its_tail_to_validation(tmp_path, text_file):
    train, validation = documents_of(tmp_path, source=str(text_file))
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
    documents = list(documents_of(tmp_path, source="someone/poems"))
    assert sum(document.split == "validation" for document in documents) == 5
    assert all(document.text.startswith(document.split) for document in documents)
    assert len(documents) == 35
