"""Which files a source names, and reading them as text."""

import bz2
import gzip
import lzma
import os
import time

import pyarrow
import pytest

from moe.config import ConfigError
from moe.data.files import PIECE, find_files, relative_names, text_pieces
from tests.support.corpora import corpus_config, documents_of, read_source


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


WORDS = "some words in a line\n" * 40


def names_of(tmp_path, **data):
    found = find_files(corpus_config(tmp_path, **data).data)
    assert found is not None
    return [os.path.basename(path) for path in found]


def test_twenty_thousand_files_are_found_named_and_read_in_seconds(tmp_path):
    for folder in range(100):
        (tmp_path / "text" / f"{folder}").mkdir(parents=True)
        for i in range(200):
            (tmp_path / "text" / f"{folder}" / f"{i}.txt").write_text(f"text {i} of {folder}")
    started = time.process_time()
    documents = documents_of(tmp_path / "c", source=str(tmp_path / "text"))
    assert time.process_time() - started < 20
    assert len(documents) == 20_000
    assert 0.04 < sum(document.split == "validation" for document in documents) / 20_000 < 0.06


def test_two_stars_of_a_glob_stand_for_any_folders(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "a" / "b" / "c"):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.txt").write_text("text")
    assert names_of(tmp_path / "x", source=f"{tmp_path}/**/*.txt") == ["a.txt", "c.txt"]
    assert names_of(tmp_path / "x", source=f"{tmp_path}/*/*.txt") == ["a.txt"]


def test_names_are_relative_to_the_deepest_common_folder():
    assert list(relative_names(["/a/b/c/1.txt", "/a/b/2.txt"])) == ["c/1.txt", "2.txt"]
    assert list(relative_names(["/a/b/1.txt"])) == ["1.txt"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
)
def test_compressed_text_and_records_are_what_they_were(tmp_path, suffix, compress):
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(WORDS.encode()))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / f"c.json.{suffix}").write_bytes(compress(b'[{"text": "one"},\n {"text": "two"}]'))
    train, validation = documents_of(tmp_path, source=str(tmp_path / f"a.txt.{suffix}"))
    assert train.text + validation.text == WORDS
    for name in ("b.jsonl", "c.json"):
        documents = documents_of(tmp_path, source=str(tmp_path / f"{name}.{suffix}"))
        assert [document.text for document in documents] == ["one", "two"]


def test_damaged_compressed_files_are_named(tmp_path):
    for suffix, compress in (("gz", gzip.compress), ("zst", zstd)):
        path = tmp_path / f"a.txt.{suffix}"
        path.write_bytes(compress(os.urandom(5000).hex().encode())[:2000])
        with pytest.raises(ConfigError, match=rf"data.source: cannot read .*a.txt.{suffix}"):
            list(read_source(tmp_path, source=str(path)))
        path.write_bytes(b"not compressed at all")
        with pytest.raises(ConfigError, match=rf"data.source: cannot read .*a.txt.{suffix}"):
            list(read_source(tmp_path, source=str(path)))


def test_a_gzip_file_with_changed_bytes_is_named(tmp_path):
    content = bytearray(gzip.compress(os.urandom(5000).hex().encode()))
    content[200:260] = bytes(60)
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data.source: cannot read .*a.txt.gz \(damaged\)"):
        list(read_source(tmp_path, source=str(tmp_path / "a.txt.gz")))


def test_suffixes_choose_among_the_files_of_a_mixed_folder(tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS)
    (folder / "meta.json").write_text('{"text": "of a record"}')
    (folder / "run.log").write_text("line\n" * 100)
    with pytest.raises(ConfigError, match=r"mixes file types \(json, text\); choose with data.suffixes"):
        names_of(tmp_path, source=str(folder))
    assert names_of(tmp_path, source=str(folder), suffixes=[".txt"]) == ["a.txt"]
    assert names_of(tmp_path, source=str(folder), suffixes=[".log", ".TXT"]) == ["a.txt", "run.log"]
    assert names_of(tmp_path, source=f"{folder}/*", suffixes=[".log"]) == ["run.log"]
    both = documents_of(tmp_path, source=str(folder), suffixes=[".txt", ".json"])
    assert "of a record" in {document.text for document in both}
    assert len(both) == 3
    with pytest.raises(ConfigError, match=r"holds no .md file"):
        names_of(tmp_path, source=str(folder), suffixes=[".md"])


def test_files_of_any_name_are_text_when_they_are_named(tmp_path):
    for name in ("server.log", "README", "odd [1].txt", "*.txt"):
        (tmp_path / name).write_text(WORDS)
        train, validation = documents_of(tmp_path, source=str(tmp_path / name))
        assert train.text + validation.text == WORDS


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-8"),  # the default; its byte-order mark says what it is
        ("utf-16", "utf-16"),
        ("latin-1", "latin-1"),
    ],
)
def test_text_is_decoded_and_a_byte_order_mark_is_no_part_of_it(tmp_path, encoding, declared):
    text = "Grüße, hélas\n" * 50
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    train, validation = documents_of(tmp_path, source=str(tmp_path / "a.txt"), encoding=declared)
    assert train.text + validation.text == text


def test_text_in_another_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"data.encoding: .*a.txt is not utf-8 text"):
        list(read_source(tmp_path, source=str(tmp_path / "a.txt")))


@pytest.mark.parametrize("name", ["a.pdf", "a.pdf.gz"])
def test_a_pdf_is_refused_as_such(tmp_path, name):
    content = b"%PDF-1.4 some words"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ConfigError, match=rf"data.source: .*{name} is a PDF, not text; extract its text"):
        list(read_source(tmp_path, source=str(tmp_path / name)))


def test_a_long_text_comes_in_pieces_that_end_with_lines(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(100_000))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(text_pieces(str(tmp_path / "a.txt"), "utf-8"))
    assert "".join(pieces) == text
    assert all(len(piece) <= PIECE and piece.endswith("\n") for piece in pieces)
    documents = documents_of(tmp_path, source=str(tmp_path / "a.txt"))
    assert "".join(document.text for document in documents) == text
    assert [document.ends for document in documents if document.ends] == [True, True]
    splits = [document.split for document in documents]
    assert splits == sorted(splits)  # training text first
    validation = "".join(document.text for document in documents if document.split == "validation")
    assert abs(len(validation) - len(text) // 20) <= 2000


def test_a_long_line_is_cut_anywhere(tmp_path):
    text = "x" * (PIECE * 2 + 10)
    (tmp_path / "a.txt").write_text(text)
    assert "".join(text_pieces(str(tmp_path / "a.txt"), "utf-8")) == text


def test_both_parts_of_a_long_file_are_there_to_the_last_letter(tmp_path):
    """Each part is read in several pieces."""
    text = "".join(f"line {number}\n" for number in range(120_000))
    assert len(text) > 5 * PIECE
    (tmp_path / "a.txt").write_text(text)
    documents = documents_of(tmp_path, source=str(tmp_path / "a.txt"), validation_share=0.5)
    parts = {split: [d.text for d in documents if d.split == split] for split in ("train", "validation")}
    assert min(len(pieces) for pieces in parts.values()) > 2
    assert "".join(parts["train"] + parts["validation"]) == text
    assert abs(len("".join(parts["train"])) - len(text) / 2) < 20
