"""One process tokenizes, the others wait; what a killed one left is removed."""

import shutil
import time
from pathlib import Path

import pytest
from filelock import FileLock

from moe.config import ConfigError
from moe.data import building
from moe.data.token_cache import prepare_corpus
from tests.support.corpora import corpus_config, prepared_folder
from tests.support.ranks import run_ranks


def prepare_slowly(source: str, cache: str, log: str) -> str:
    """Called on several ranks: log when a tokenizer is made, which happens where the text is tokenized."""
    real = building.load_tokenizer

    def load_and_log(*arguments):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(1)
        return real(*arguments)

    building.load_tokenizer = load_and_log
    return prepare_corpus(corpus_config(Path(cache), source=source)).fingerprint


def test_of_four_ranks_one_tokenizes_and_the_others_wait(tmp_path, text_file):
    fingerprints = run_ranks(4, prepare_slowly, str(text_file), str(tmp_path / "c"), str(tmp_path / "log"))
    assert len(set(fingerprints)) == 1
    assert (tmp_path / "log").read_text() == "built\n"


@pytest.mark.parametrize("what", ["hashes", "builds"])
def test_waiting_for_another_process_ends_with_one_line(tmp_path, text_file, capsys, what):
    config = corpus_config(tmp_path / "c", source=str(text_file), cache_timeout_s=0.2)
    prepare_corpus(config)
    folder = prepared_folder(tmp_path / "c")
    names = {path.name for path in (tmp_path / "c" / "locks").iterdir()}
    (name,) = {folder.name} if what == "builds" else {name for name in names if len(name) == 64}
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "c" / "hashes", ignore_errors=True)
    lock = FileLock(tmp_path / "c" / "locks" / name)
    with lock, pytest.raises(ConfigError, match=r"^data.cache_timeout_s: another process has been"):
        prepare_corpus(config)
    assert "waiting for another process" in capsys.readouterr().err


def test_what_a_killed_process_left_is_removed(tmp_path, text_file):
    config = corpus_config(tmp_path / "c", source=str(text_file))
    prepare_corpus(config)
    folder = prepared_folder(tmp_path / "c")
    orphan = folder.with_name(f".{folder.name}-123")
    folder.rename(orphan)
    (orphan / "meta.json").unlink()
    prepare_corpus(config)
    assert not orphan.exists()
