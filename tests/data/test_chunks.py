"""Chunks of text: sizes, processes and kills change no token, and nothing is tokenized twice."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from moe.data import chunks
from moe.data.files import PIECE
from moe.data.token_cache import plan_build, prepare_corpus
from tests.support.corpora import corpus_config

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def records(tmp_path):
    """Documents of all lengths, some blank, one in pieces."""
    draw = random.Random(0)
    texts = [f"{i} " + "word " * draw.choice((0, 3, 40, 300)) for i in range(300)]
    texts[20] = texts[200] = " \n"
    texts[100] = "long " * (PIECE // 4)
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def files_of(config):
    """What the cache holds of a corpus, by name."""
    prepare_corpus(config)
    return {path.name: path.read_bytes() for path in plan_build(config).folder.iterdir()}


@pytest.fixture
def whole(tmp_path, records):
    """The files that one process makes in one chunk."""
    return files_of(corpus_config(tmp_path / "whole", source=records))


@pytest.mark.parametrize("size", [1, 500, 5000, 200_000])
def test_the_size_of_chunks_changes_nothing(tmp_path, records, whole, monkeypatch, size):
    monkeypatch.setattr(chunks, "CHUNK", size)
    assert files_of(corpus_config(tmp_path / "c", source=records)) == whole


def tokenize(config, log, then):
    """In a process of its own."""
    chunks.CHUNK = 2000
    real = chunks.Chunks._write

    def write(self, number, pieces, bad):
        then(number)
        real(self, number, pieces, bad)
        with log.open("a") as file:
            file.write(f"{os.getpid()} {number}\n")

    chunks.Chunks._write = write
    list(plan_build(config).tokenize())


def written(log):
    return [tuple(map(int, line.split())) for line in log.read_text().splitlines()]


def killed_at_fifth(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_started_again_makes_the_same_files_and_tokenizes_nothing_twice(
    tmp_path, records, whole, monkeypatch
):
    config, log = corpus_config(tmp_path / "c", source=records), tmp_path / "log"
    killed = FORK.Process(target=tokenize, args=(config, log, killed_at_fifth))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    again = FORK.Process(target=tokenize, args=(config, log, lambda number: None))
    again.start()
    again.join(60)
    numbers = [number for _, number in written(log)]
    assert numbers == list(range(len(numbers)))
    assert len({process for process, _ in written(log)}) == 2
    monkeypatch.setattr(chunks.Chunks, "_encode", None)  # nothing is left to be tokenized
    monkeypatch.setattr(chunks, "CHUNK", 2000)
    assert files_of(config) == whole


def test_processes_share_the_work_and_do_that_of_one_that_is_killed(tmp_path, records, whole, monkeypatch):
    config, log = corpus_config(tmp_path / "c", source=records), tmp_path / "log"
    first = FORK.Process(target=tokenize, args=(config, log, killed_at_fifth))
    others = [FORK.Process(target=tokenize, args=(config, log, lambda _: time.sleep(0.01))) for _ in "ab"]
    for process in (first, *others):
        process.start()
    for process in (first, *others):
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0]
    numbers = [number for _, number in written(log)]
    assert sorted(numbers) == list(range(len(numbers)))
    assert {process.pid for process in others} <= {process for process, _ in written(log)}
    monkeypatch.setattr(chunks.Chunks, "_encode", None)
    monkeypatch.setattr(chunks, "CHUNK", 2000)
    assert files_of(config) == whole


def test_a_longer_run_of_a_stream_appends(tmp_path, records, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 2000)
    config = corpus_config(tmp_path / "c", source=records, streaming=True)
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 400})})
    expected = files_of(
        longer.model_copy(
            update={"data": longer.data.model_copy(update={"cache_dir": str(tmp_path / "other")})}
        )
    )
    encoded, real = [], chunks.Chunks._encode

    def encode(self, batch):
        encoded.extend(piece.document.text for piece in batch)
        return real(self, batch)

    monkeypatch.setattr(chunks.Chunks, "_encode", encode)
    short = files_of(config)
    before = len(encoded)
    assert files_of(longer) == expected
    assert 0 < before < len(encoded)
    assert len(encoded) == len(set(encoded)), "no document is tokenized again"
    assert expected["train.bin"].startswith(short["train.bin"])
    assert expected["validation.bin"] == short["validation.bin"]


def test_what_a_build_left_long_ago_is_removed(tmp_path, records):
    cache = tmp_path / "c"
    for name, days in (("old-chunks", 31), ("young-chunks", 29)):
        (cache / name / "train").mkdir(parents=True)
        stamp = time.time() - days * 86_400
        for path in (cache / name / "train", cache / name):
            os.utime(path, (stamp, stamp))
    files_of(corpus_config(cache, source=records))
    assert not (cache / "old-chunks").exists()
    assert (cache / "young-chunks").exists()
    assert len(list(cache.glob("*-chunks"))) == 1, "those of this build are gone"


def test_a_log_says_every_few_seconds_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(chunks, "LOG_INTERVAL_S", 0.0)
    assert list(chunks.with_progress("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().out == "".join(f"reading: {number} documents\n" for number in (1, 2, 3))
    monkeypatch.undo()
    assert list(chunks.with_progress("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().out == ""
