"""Shared fixtures: a small real corpus and the overrides that make a run take a second."""

import argparse
import inspect
import json
import os
import textwrap
from pathlib import Path

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # no test depends on the network, where there is one
os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU tensors; read when Triton is first imported
os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny, and tests run side by side
os.environ["TORCHDYNAMO_DISABLE"] = (
    "1"  # else each DeepSpeed process loads a compiler that it does not use: 2 s
)

import pytest
import torch

import train
from moe.inference import sample_text
from moe.inference.generation import Sampling

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no worker is left with a long one at the end."""
    if "MUTANTS" not in os.environ:  # tests/mutants/run.py gives an order of its own
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """200 kB of Python source in one text file."""
    path = tmp_path_factory.mktemp("corpus") / "source.txt"
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, textwrap, json))
    path.write_text(text[:200_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(text_file, cache_dir) -> list[str]:
    """Overrides of a model with every feature on, and steps of milliseconds."""
    return [
        f"data.source={text_file}",
        f"data.cache_dir={cache_dir}",
        "data.tokenizer=bytes",
        "data.seq_len=32",
        "model.d_model=32",
        "model.n_layers=2",
        "model.n_heads=4",
        "model.n_kv_heads=2",
        "model.d_ff=64",
        "model.max_seq_len=64",
        "model.qk_norm=true",
        "model.dropout=0.1",
        "moe.num_experts=4",
        "moe.top_k=2",
        "moe.d_ff_expert=32",
        "moe.num_shared_experts=1",
        "train.steps=12",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "train.eval_interval=6",
        "train.eval_batches=2",
        "train.checkpoint_interval=4",
        "optim.warmup_steps=2",
        "log.interval=1",
        "parallel.device=cpu",
    ]


@pytest.fixture
def short_samples(monkeypatch) -> None:
    """Runs in this process end with a few tokens of text: where it is not the subject, it takes longest."""
    monkeypatch.setattr(sample_text, "SAMPLING", Sampling(max_new_tokens=4))


@pytest.fixture
def run_main(small, short_samples, tmp_path, capsys):
    """Call train.py's main in this process: (exit code, run folder, stdout, stderr)."""

    def call(*overrides: str, folder: str = "run") -> tuple[int, Path, str, str]:
        run = tmp_path / folder
        code = train.main([*small, f"run.dir={run}", *overrides])
        printed = capsys.readouterr()
        return code, run, printed.out, printed.err

    return call
