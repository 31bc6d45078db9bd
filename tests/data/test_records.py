"""Records of every kind of file, and what becomes of those without text."""

import json

import pytest

from moe.config import ConfigError
from moe.data.files import PIECE
from moe.data.records import BadRecord
from moe.data.token_cache import prepare_corpus
from tests.support.corpora import corpus_config, documents_of, read_source

TEXTS = [f'record {i}, with a comma and a "quote"\nand a second line\t' for i in range(60)]


def as_csv(texts, delimiter):
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return f"id{delimiter}text\n" + "".join(f"{i}{delimiter}{text}\n" for i, text in enumerate(quoted))


FILES = {
    "a.jsonl": "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)),
    "lines.json": "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)),
    "array.json": json.dumps([{"text": text} for text in TEXTS]),
    "pretty.json": json.dumps([{"text": text} for text in TEXTS], indent=2),
    "objects.json": "\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS),
    "a.csv": as_csv(TEXTS, ","),
    "semicolons.csv": as_csv(TEXTS, ";"),
    "a.tsv": as_csv(TEXTS, "\t"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_records_of_every_kind_of_file_are_read_to_the_letter(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert [document.text for document in documents_of(tmp_path, source=str(tmp_path / name))] == TEXTS


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_the_ends_of_lines_in_quoted_fields_stay_as_they_are(tmp_path, name, delimiter):
    texts = [f"one\r\ntwo\rthree\n{number}" for number in range(9)]
    (tmp_path / name).write_text(as_csv(texts, delimiter), newline="")
    assert [document.text for document in documents_of(tmp_path, source=str(tmp_path / name))] == texts


@pytest.mark.parametrize("splits", [["train"], ["train", "validation"], None])
def test_a_saved_dataset_is_read_with_its_own_validation_split(tmp_path, splits):
    import datasets

    table = datasets.Dataset.from_dict({"text": TEXTS})
    saved = table if splits is None else datasets.DatasetDict(dict.fromkeys(splits, table))
    saved.save_to_disk(tmp_path / "saved")
    documents = documents_of(tmp_path, source=str(tmp_path / "saved"))
    for split in ("train", "validation") if splits and len(splits) == 2 else ():
        assert [each.text for each in documents if each.split == split] == TEXTS
    if not splits or len(splits) == 1:
        assert [each.text for each in documents] == TEXTS


def test_records_longer_than_a_piece_come_in_pieces(tmp_path):
    long = "word " * PIECE
    for name, content in (
        ("a.jsonl", json.dumps({"text": long})),
        ("b.json", json.dumps([{"text": long}] * 2)),
    ):
        (tmp_path / name).write_text(content)
        documents = documents_of(tmp_path, source=str(tmp_path / name))
        assert documents[0].text == long[:PIECE]
        assert "".join(document.text for document in documents[:5]) == long
        assert [document.ends for document in documents[:5]] == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": null}', "field 'text' is null"),
        ('{"body": "x", "id": 1}', "no field 'text'; the records have body, id"),
        ('{"text": 3}', "field 'text' is a number, not text"),
        ('{"text": ["a"]}', "field 'text' is a list, not text"),
        ('{"text": "a \\ud800 b"}', "field 'text' holds half of a surrogate pair, which is no character"),
        ("[" * 100_000, "is nested too deeply"),
        ("[1]", "is a list, not an object with fields"),
        ('{"text": "cut', "is not JSON (Invalid control character at)"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_record_is_named_or_skipped_and_counted(tmp_path, line, problem, capsys):
    path = tmp_path / "notes.jsonl"
    good = [json.dumps({"text": f"good record {i}"}) for i in range(60)]
    path.write_text("\n".join([*good[:41], line, *good[41:], line, ""]))
    bad = [each for each in read_source(tmp_path, source=str(path)) if isinstance(each, BadRecord)]
    assert bad == [BadRecord(f"notes.jsonl, record {number}", problem) for number in (42, 62)]
    with pytest.raises(ConfigError) as refused:
        prepare_corpus(corpus_config(tmp_path / "c", source=str(path)))
    fix = "fix it, or skip such records with data.on_bad_record=skip"
    assert str(refused.value) == f"data.text_field: notes.jsonl, record 42: {problem}; {fix}"
    prepared = prepare_corpus(corpus_config(tmp_path / "c", source=str(path), on_bad_record="skip"))
    assert capsys.readouterr().err.count(f"left out 2 records, first notes.jsonl, record 42: {problem}") == 1
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    clean = prepare_corpus(corpus_config(tmp_path / "c", source=str(tmp_path / "good.jsonl")))
    assert prepared.train.tokens.tolist() == clean.train.tokens.tolist()
    assert prepared.fingerprint != clean.fingerprint


def test_chats_become_text_with_roles(tmp_path):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    (document,) = documents_of(tmp_path, source=str(tmp_path / "chat.jsonl"), text_field="messages")
    assert document.text == "user: Hello?\n\nassistant: Hello."


def test_empty_texts_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "", " \n"]))
    prepared = prepare_corpus(corpus_config(tmp_path / "c", source=str(path)))
    end = prepared.tokenizer.token_to_id(prepared.end_token)
    documents = (prepared.train.tokens == end).sum() + (prepared.validation.tokens == end).sum()
    assert documents == len(TEXTS)
