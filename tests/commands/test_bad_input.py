"""Wrong input: one line that names the key and the fix, exit code 2, nothing written."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.support.commands import exit_code
from tests.support.paths import ROOT

CASES = {
    # key of the configuration
    "moe.num_expert=4": "moe.num_expert: no such key, did you mean moe.num_experts?",
    "mode.top_k=2": "mode: no such key, did you mean model?",
    "mystery.key=1": "mystery: no such key",
    "steps=5": "steps: names no section, did you mean train.steps?",
    "train.steps": "train.steps: is not section.key=value",
    "model=3": "model: names no key of this section; write one such as model.d_model=VALUE",
    "mixed": "RUN: mixed is not a run's folder; give one such as runs/tiny, or a YAML file; to train",
    "short.txt": "CONFIG: short.txt is not a YAML file; to train on its text, write data.source=short.txt",
    "data.txt": "CONFIG: data.txt is not a YAML file; to train on its text, write data.source=data.txt",
    "--help=mo": "--help: no section or key 'mo'; the sections are run, model, moe, data,",
    # type and range
    "moe.num_experts=eight": "moe.num_experts: should be a valid integer",
    "train.steps=1.5": "train.steps: should be a valid integer, got 1.5; write one such as 300",
    "train.steps=2e3": "train.steps: should be a valid integer, got 2000.0; write 2000",
    "optim.lr=fast": 'optim.lr: should be a valid number, got "fast"; write one such as 0.003',
    "moe.capacity_factor=None": 'moe.capacity_factor: should be a valid number, got "None"; for none, write',
    "model.d_model='64'": "model.d_model: should be a valid integer",
    "model.tie_embeddings=1": "model.tie_embeddings: should be a valid boolean",
    "train.steps=0": "train.steps: should be greater than 0, got 0",
    "optim.lr=.nan": "optim.lr: should be a finite number, got NaN",
    "optim.lr=-1": "optim.lr: should be greater than 0",
    "optim.betas=[0.9,1.0]": "optim.betas: each must be at least 0 and less than 1",
    "optim.betas=0.9": "optim.betas: should be a valid array, got 0.9; write one such as [0.9, 0.95]",
    "optim.betas=0.9,0.99": 'optim.betas: should be a valid array, got "0.9,0.99"; write [0.9,0.99]',
    "optim.betas=[0.9]": "optim.betas: Field required, got [0.9]; write one such as [0.9, 0.95]",
    "data.suffixes=.txt,.md": 'data.suffixes: should be a valid array, got ".txt,.md"; write [.txt,.md]',
    "model.head_dim=wide": 'model.head_dim: should be a valid integer, got "wide"',
    "moe.capacity_factor=0": "moe.capacity_factor: should be greater than 0",
    "model.d_model=60 model.n_heads=4": "model.head_dim: rotary positions need an even width, got 15",
    "parallel.zero_stage=3": "parallel.zero_stage: should be 1 or 2, got 3",
    "parallel.precision=fp16": "parallel.precision: should be 'fp32' or 'bf16'",
    "log.wandb=maybe": "log.wandb: should be 'disabled', 'offline' or 'online'",
    "run.name=a/b": "run.name: may hold letters, digits, _, . and -, got",
    "run.seed=-1": "run.seed: should be greater than or equal to 0",
    "data.source=${nowhere}": "CONFIG: ",
    # keys that contradict each other
    "moe.top_k=5": "moe.top_k: 5 is more than moe.num_experts (4)",
    "moe.top_k=1": "moe.normalize_gate_weights: with moe.top_k=1",
    "parallel.ep_size=3": "parallel.ep_size: 3 does not divide moe.num_experts (4)",
    "parallel.ep_size=2": "parallel.ep_size: ",
    "model.n_heads=5 model.n_kv_heads=5": "model.n_heads: 5 does not divide model.d_model (32)",
    "model.n_kv_heads=3": "model.n_kv_heads: 3 does not divide model.n_heads (4)",
    "model.head_dim=7": "model.head_dim: rotary positions need an even width",
    "data.seq_len=65": "data.seq_len: 65 is longer than model.max_seq_len (64)",
    "moe.first_dense_layers=2": "moe.first_dense_layers: no MoE layer is left",
    "train.micro_batch_size=3": "train.micro_batch_size: 3 does not divide train.global_batch_size (4)",
    "optim.warmup_steps=13": "optim.warmup_steps: 13 is more than train.steps (12)",
    "parallel.timeout_s=1e300": "parallel.timeout_s: should be less than or equal to 1000000",
    "parallel.device=cuda": "parallel.device: torch sees no CUDA device",
    # data
    "data.source=missing.txt": "data.source: no such file: missing.txt",
    "data.source=./nowhere": "data.source: no such file: ./nowhere",
    "data.source=*.nothing": "data.source: no such file: *.nothing",
    "data.source=empty.txt": "data.source: empty.txt holds no text",
    "data.source=emptydir": "data.source: folder emptydir holds no text, JSON, CSV or Parquet file",
    "data.source=binary.txt": "data.encoding: binary.txt is not utf-8 text",
    "data.source=zeros.txt": "data.source: zeros.txt is a binary file",
    "data.source=mixed": "data.source: mixed mixes file types (csv, text); choose with data.suffixes",
    "data.source=rows.jsonl": "data.text_field: rows.jsonl, record 1: no field 'text'; the records have body",
    "data.source=rows.jsonl data.text_field=bodi": "data.text_field: rows.jsonl, record 1: no field 'bodi'",
    "data.source=numbers.jsonl": "data.text_field: numbers.jsonl, record 1: field 'text' is a number",
    "data.source=broken.jsonl": "data.text_field: broken.jsonl, record 1: is not JSON",
    "data.source=null.jsonl": "data.text_field: null.jsonl, record 3: field 'text' is null",
    "data.source=broken.json": "data.source: broken.json is not JSON",
    "data.source=broken.txt.gz": "data.source: cannot read broken.txt.gz (damaged)",
    "data.source=mixed data.suffixes=[.md]": "data.source: folder mixed holds no .md file",
    "data.encoding=utf-99": "data.encoding: 'utf-99' is no encoding",
    "data.encoding=hex": "data.encoding: 'hex' is no encoding",
    "data.validation_share=0": "data.validation_share: 0 leaves no text to evaluate on",
    "data.validation=missing.txt": "data.validation: no such file: missing.txt",
    "data.extra_validation.a=missing.txt": "data.extra_validation: no such file: missing.txt",
    "data.extra_validation.loss=short.txt": "data.extra_validation: 'loss' cannot name",
    "data.source=someone/something": "data.source: 'someone/something' is not a file here, and the hub",
    "data.source=short.txt": "data.seq_len: 32 is longer than the",
    "data.cache_dir=short.txt/cache": "data.cache_dir: cannot write to",
    # tokenizer
    "data.tokenizer=bpe:10": "data.tokenizer: 'bpe:10' should be bpe:N with N at least 257",
    "data.tokenizer=bpe:\u00b2": "data.tokenizer: 'bpe:\u00b2' should be bpe:N",
    "data.tokenizer=bpe:many": "data.tokenizer: 'bpe:many' should be bpe:N",
    "data.tokenizer=bpe:999999": "data.tokenizer: the corpus supports only",
    "data.tokenizer=missing.json": "data.tokenizer: cannot read tokenizer missing.json",
    "data.tokenizer=rows.jsonl": "data.tokenizer: cannot read tokenizer rows.jsonl",
    "data.tokenizer=nobody/nothing": "data.tokenizer: 'nobody/nothing' is neither",
    "data.end_token=STOP": "data.end_token: the tokenizer has no token STOP",
    "model.vocab_size=100": "model.vocab_size: 100 is less than the tokenizer's 257",
    # run folder
    "run.dir=foreign": "run.dir: foreign holds other files and no run",
    "run.dir=hydra": "run.dir: hydra holds other files and no run",
    "run.dir=short.txt": "run.dir: short.txt is a file",
    "run.dir=short.txt/run": "run.dir: short.txt/run cannot be written",
    "run.dir=/proc/run": "run.dir: ",
    "run.resume=must": "run.resume: must, but fresh holds no checkpoint",
    # configuration file, in the place of the first override
    "nowhere.yaml": "CONFIG: cannot read nowhere.yaml (No such file or directory)",
    "notyaml.yaml": "CONFIG: notyaml.yaml is not valid YAML",
    "list.yaml": "CONFIG: list.yaml holds no sections",
    "binary.yaml": "CONFIG: cannot read binary.yaml (not UTF-8 text)",
    "--unknown-option": "unrecognized arguments: --unknown-option",
}


@pytest.fixture(scope="module")
def folder_of_bad_things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").touch()
    (folder / "emptydir").mkdir()
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "data.txt").write_text("words\n" * 100)
    (folder / "zeros.txt").write_bytes(b"text\0text")
    (folder / "short.txt").write_text("a few words\nand a few more\n")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").write_text("text")
    (folder / "mixed" / "b.csv").write_text("text\nrow")
    (folder / "rows.jsonl").write_text('{"body": "a"}\n' * 9)
    (folder / "numbers.jsonl").write_text('{"text": 1}\n' * 9)
    (folder / "broken.jsonl").write_text('{"text": "a"\nnot json at all')
    (folder / "null.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": null}\n')
    (folder / "broken.json").write_text('[{"text": "a"}, {"text": ')
    (folder / "broken.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:50])
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.doc").write_text("ten years of work")
    (folder / "hydra").mkdir()
    (folder / "hydra" / "config.yaml").write_text("my: other project")
    (folder / "hydra" / "metrics.jsonl").write_text('{"mine": 1}\n')
    (folder / "notyaml.yaml").write_text("a: [1, 2\nb: }")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    return folder


def snapshot(folder: Path):
    """All files and folders, but the cache's locks, and the hashes of files that it has seen."""
    paths = [path for path in folder.rglob("*") if not {"locks", "hashes"} & set(path.parts)]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def refused(arguments, capsys):
    """The one line on stderr of a refused command."""
    code = exit_code(train.main, arguments)
    printed = capsys.readouterr()
    assert code == 2, printed
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert len(printed.err) < 420
    return printed.err.removeprefix("error: ")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_writes_nothing(
    case, small, folder_of_bad_things, cache_dir, monkeypatch, capsys
):
    monkeypatch.chdir(folder_of_bad_things)
    before, cache_before = snapshot(folder_of_bad_things), snapshot(cache_dir)
    items = case.split() if not case.startswith("model.d_model='") else [case]
    if "=" in items[0] or items[0] == "train.steps":
        arguments = [*small, "run.dir=fresh", *items]
    else:
        arguments = [items[0], *small, "run.dir=fresh"]
    line = refused(arguments, capsys)
    assert line.startswith(CASES[case]), line
    assert snapshot(folder_of_bad_things) == before
    assert snapshot(cache_dir) == cache_before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("model.d_model=64", "model.d_model: differs from the run"),
        ("moe.num_experts=8", "moe.num_experts: differs from the run"),
        (
            "optim.lr=0.1",
            "optim.lr: differs from the run in {run}: optim.lr (was 0.003, now 0.1); restore it",
        ),
        ("run.seed=7", "run.seed: differs from the run"),
        ("train.global_batch_size=8", "train.global_batch_size: differs from the run"),
        ("data.seq_len=16", "data.seq_len: differs from the run"),
        ("run.resume=never", "run.resume: never, but {run} holds a run"),
        ("train.steps=3", "train.steps: 3, but the run is already at step 4"),
    ],
)
def test_another_experiment_is_refused_by_key(run_main, small, capsys, change, expected):
    code, run, _, _ = run_main("train.steps=4")
    assert code == 0
    before = snapshot(run)
    line = refused([*small, f"run.dir={run}", "train.steps=4", change], capsys)
    assert line.startswith(expected.format(run=run)), line
    assert snapshot(run) == before


def test_changed_text_is_refused_on_resume(small, short_samples, tmp_path, capsys):
    source = tmp_path / "text.txt"
    source.write_text("some words and more\n" * 300)
    arguments = [*small, f"data.source={source}", f"run.dir={tmp_path / 'run'}", "train.steps=4"]
    assert train.main(arguments) == 0
    capsys.readouterr()
    source.write_text("other words and more\n" * 300)
    assert refused([*arguments, "train.steps=8"], capsys).startswith(
        "data.source: the text or its tokens changed"
    )


def test_a_run_whose_checkpoints_are_all_damaged_is_not_silently_restarted(run_main, small, capsys):
    _, run, _, _ = run_main("train.steps=4")
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    line = refused([*small, f"run.dir={run}"], capsys)
    assert line.startswith("run.dir: checkpoint")
    assert "choose another run.name" in line


def test_a_finished_run_without_its_checkpoints_is_not_overwritten(run_main, small, capsys):
    _, run, _, _ = run_main("train.steps=4")
    shutil.rmtree(run / "checkpoints")
    before = snapshot(run)
    line = refused([*small, f"run.dir={run}", "model.d_model=64"], capsys)
    assert line.startswith(f"run.dir: {run} is a finished run whose checkpoints are gone")
    assert snapshot(run) == before


def test_options_may_stand_anywhere_and_a_yaml_name_may_hold_an_equals_sign(tmp_path, capsys):
    (tmp_path / "lr=3").mkdir()
    (tmp_path / "lr=3" / "c.yaml").write_text("train: {steps: 70}")
    path = str(tmp_path / "lr=3" / "c.yaml")
    assert train.main([path, "moe.num_experts=16", "--print-config", "train.eval_interval=5"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 70" in shown
    assert "eval_interval: 5" in shown


@pytest.mark.slow
def test_half_of_a_launchers_variables_are_refused_by_the_command_too(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    call = [sys.executable, str(ROOT / "train.py"), f"run.dir={tmp_path / 'run'}"]
    done = subprocess.run(
        call, env=environment | {"WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: WORLD_SIZE: is set but RANK")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
