"""scripts/tokenize_corpus.py: the same files as train.py makes, with any number of processes."""

import json

import pytest

from moe.config import load_config
from moe.data.token_cache import plan_build, prepare_corpus
from scripts.tokenize_corpus import main
from tests.support.commands import assert_refused
from tests.support.paths import TINY


@pytest.fixture
def overrides(tmp_path, text_file):
    """Of a configuration with a mixture."""
    text = text_file.read_text()
    for name, part in (("a", text[:100_000]), ("b", text[100_000:])):
        records = [json.dumps({"text": part[at : at + 700]}) for at in range(0, len(part), 700)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(records))
    sources = [f"data.sources.{name}.source={tmp_path / name}.jsonl" for name in "ab"]
    return [*sources, "data.sources.a.weight=1", "data.sources.b.weight=2", "data.tokenizer=bpe:400"]


@pytest.mark.slow
def test_two_processes_make_what_training_makes(overrides, tmp_path, capsys, monkeypatch):
    for name in ("TOKENIZERS_PARALLELISM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # and set back afterwards
    shared, own = (f"data.cache_dir={tmp_path / name}" for name in ("shared", "own"))
    assert main([str(TINY), *overrides, shared, "--processes", "2"]) == 0
    out = capsys.readouterr().out
    expected, config = load_config(TINY, [*overrides, own]), load_config(TINY, [*overrides, shared])
    corpus = prepare_corpus(expected)
    assert f"{len(corpus.train.sources['b']):,} training tokens of b" in out
    folder, other = plan_build(config).folder, plan_build(expected).folder
    assert str(folder) in out
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == {path.name: path.read_bytes() for path in other.iterdir()}
    assert main([str(TINY), *overrides, shared]) == 0  # and again, from the cache
    assert capsys.readouterr().out.splitlines() == [
        *out.splitlines()[:4], f"was tokenized before; {folder}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "error: the following arguments are required"),
        (["nowhere.yaml"], "error: CONFIG: cannot read nowhere.yaml"),
        (["TINY", "data.source=nowhere.txt"], "error: data.source: no such file: nowhere.txt"),
        (["TINY", "--processes", "0"], "error: argument --processes: should be a whole number above 0"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, expected, capsys):
    assert_refused(main, [str(TINY) if item == "TINY" else item for item in arguments], expected, capsys)


def test_a_bad_record_that_a_process_meets_is_one_line(tmp_path, capsys, monkeypatch):
    for name in ("TOKENIZERS_PARALLELISM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": null}\n')
    call = [str(TINY), f"data.source={tmp_path / 'a.jsonl'}", f"data.cache_dir={tmp_path / 'c'}"]
    assert main([*call, "data.tokenizer=bytes", "--processes", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: data.text_field: a.jsonl, record 2")
