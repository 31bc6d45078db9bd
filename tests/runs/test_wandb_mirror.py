"""The mirror on Weights & Biases: whatever it does, training goes on."""

import json
import subprocess
import sys
import time
import types
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.runs import read_lines


class FakeWandb(types.ModuleType):
    """What of the library the mirror uses, and what it was given."""

    def __init__(self, api_key):
        super().__init__("wandb")
        self.Settings, self.api = dict, types.SimpleNamespace(api_key=api_key)
        self.init: Any = None
        self.arguments, self.logged = {}, []


def fake_wandb(**behaviour):
    module = FakeWandb(behaviour.get("key", "secret"))

    class Run:
        def log(self, line, step):
            behaviour.get("log", lambda: None)()
            module.logged.append((step, line))

        def finish(self):
            behaviour.get("finish", lambda: None)()

    def init(**keywords):
        behaviour.get("init", lambda: None)()
        module.arguments = keywords
        return Run()

    module.init = init
    return module


def fail():
    raise RuntimeError("the network is down")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_wandb_changes_nothing(run_main, monkeypatch, where):
    _, plain, _, _ = run_main("train.steps=3", folder="plain")
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(**{where: fail}))
    code, run, _, err = run_main("train.steps=3", "log.wandb=online", folder="mirrored")
    assert code == 0
    assert err == "W&B stopped (the network is down); training continues, metrics.jsonl is complete\n"
    assert read_lines(run) == read_lines(plain)


def test_wandb_online_without_a_key_never_asks_on_the_terminal(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(key=None, init=lambda: input("1, 2 or 3?")))
    code, _, _, err = run_main("train.steps=3", "log.wandb=online")
    assert code == 0
    assert err.startswith("W&B stopped (no API key; run wandb login)")


def test_a_blocking_wandb_never_blocks_the_run(run_main, monkeypatch):
    monkeypatch.setattr("moe.runs.wandb_mirror._PATIENCE_S", 0.5)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(init=lambda: time.sleep(60)))
    start = time.perf_counter()
    assert run_main("train.steps=3", "log.wandb=online")[0] == 0
    assert time.perf_counter() - start < 20


def test_a_blocking_wandb_does_not_keep_the_process_alive(tmp_path):
    script = """
import sys, time, types
sys.modules["wandb"] = types.SimpleNamespace(
    api=types.SimpleNamespace(api_key="key"), Settings=dict, init=lambda **_: time.sleep(600)
)
from pathlib import Path
from moe.config import Config
from moe.runs import wandb_mirror
wandb_mirror._PATIENCE_S = 0.1
mirror = wandb_mirror.WandbMirror(Config(log={"wandb": "online"}), Path(sys.argv[1]))
mirror.write({"step": 1})
mirror.close()
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60, cwd=ROOT)


def test_wandb_gets_every_line_under_its_step(run_main, monkeypatch):
    module = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    code, run, _, _ = run_main("train.steps=3", "log.wandb=online", "log.wandb_project=mine")
    assert code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert module.arguments["project"] == "mine"
    assert module.arguments["config"]["moe.num_experts"] == 4
    for line in lines:
        for name in [name for name, value in line.items() if isinstance(value, list)]:
            line |= {f"{name}/{i}": each for i, each in enumerate(line.pop(name))}
    assert "moe/layers/max_vio/1" in lines[0]
    assert module.logged == [
        (line["step"], {k: v for k, v in line.items() if v is not None}) for line in lines
    ]


@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run(run_main):
    code, run, _, err = run_main("train.steps=3", "log.wandb=offline")
    assert code == 0
    assert "W&B stopped" not in err
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
