import json
import sys
import time
import types

import pytest
import torch

from moe.config import parse_config
from moe.model.moe_layer import MoEAux
from moe.runs.environment import describe_environment
from moe.runs.metrics_log import MetricsLog, read_metrics
from moe.training.step_metrics import StepMeter
from tests.conftest import read_lines


def make_aux(counts, dropped=0, balance=1.0, z=2.0, entropy=0.5, sent=0):
    layers = len(counts)
    return MoEAux(
        torch.full((layers,), balance),
        torch.full((layers,), z),
        torch.tensor(counts),
        torch.tensor([dropped] * layers),
        torch.full((layers,), entropy),
        torch.full((layers,), sent),
    )


def test_router_metrics_of_a_hand_worked_step():
    meter = StepMeter(torch.device("cpu"))
    meter.add(
        torch.tensor(3.0), make_aux([[4, 0, 0, 0], [1, 1, 1, 1]], dropped=1, balance=2.0, entropy=1.0, sent=5)
    )
    meter.add(
        torch.tensor(5.0), make_aux([[2, 2, 0, 0], [1, 1, 1, 1]], dropped=0, balance=1.0, entropy=0.0, sent=7)
    )
    metrics = meter.read(num_ranks=1)
    # Layer 0 got 6, 2, 0, 0 (max / mean = 6 / 2), layer 1 got 2, 2, 2, 2 (1).
    assert metrics == {
        "loss/lm": 4.0,
        "loss/load_balancing": 1.5,
        "loss/router_z": 2.0,
        "moe/load_imbalance": 2.0,
        "moe/dropped_fraction": 2 / 16,
        "moe/router_entropy": 0.5,
        "moe/dead_experts": 2,
        "comm/dispatch_bytes": 2 * 5 + 2 * 7,
    }


def test_two_collapsed_layers_do_not_cancel():
    meter = StepMeter(torch.device("cpu"))
    meter.add(torch.tensor(1.0), make_aux([[8, 0], [0, 8]]))
    metrics = meter.read(1)
    assert (metrics["moe/load_imbalance"], metrics["moe/dead_experts"]) == (2.0, 2)


def test_a_dense_model_has_no_router_metrics():
    meter = StepMeter(torch.device("cpu"))
    meter.add(torch.tensor(3.0), None)
    metrics = meter.read(1)
    assert metrics.pop("loss/lm") == 3.0
    assert len(metrics) == 7
    assert set(metrics.values()) == {None}


def test_a_log_is_cut_back_on_resume_and_refuses_not_a_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, parse_config({}))
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    log = MetricsLog(path, 3, parse_config({}))
    log.write({"step": 4, "again": True})
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write({"step": 5, "loss": float("nan")})
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True}]


def fake_wandb(**behaviour):
    module = types.ModuleType("wandb")
    module.logged = []

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

    module.init, module.Settings = init, dict
    module.api = types.SimpleNamespace(api_key=behaviour.get("key", "secret"))
    return module


def fail():
    raise RuntimeError("the network is down")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_wandb_changes_nothing(run_main, monkeypatch, where):
    _, plain, _, _ = run_main("train.steps=3", folder="plain")
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(**{where: fail}))
    code, run, _, err = run_main("train.steps=3", "log.wandb=online", folder="mirrored")
    assert code == 0
    assert err == "W&B stopped (the network is down); training goes on, metrics.jsonl is complete\n"
    assert read_lines(run) == read_lines(plain)


def test_wandb_online_without_a_key_never_asks_on_the_terminal(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(key=None, init=lambda: input("1, 2 or 3?")))
    code, _, _, err = run_main("train.steps=3", "log.wandb=online")
    assert code == 0
    assert err.startswith("W&B stopped (no API key; run wandb login)")


def test_a_blocking_wandb_never_blocks_the_run(run_main, monkeypatch):
    monkeypatch.setattr("moe.runs.metrics_log._WANDB_PATIENCE_S", 0.5)
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(init=lambda: time.sleep(60)))
    start = time.perf_counter()
    assert run_main("train.steps=3", "log.wandb=online")[0] == 0
    assert time.perf_counter() - start < 20


def test_wandb_gets_every_line_under_its_step(run_main, monkeypatch):
    module = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    code, run, _, _ = run_main("train.steps=3", "log.wandb=online", "log.wandb_project=mine")
    assert code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert module.arguments["project"] == "mine"
    assert module.arguments["config"]["moe.num_experts"] == 4
    assert module.logged == [
        (line["step"], {k: v for k, v in line.items() if v is not None}) for line in lines
    ]


@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run(run_main):
    code, run, _, err = run_main("train.steps=3", "log.wandb=offline")
    assert code == 0
    assert "W&B stopped" not in err
    assert list(run.glob("wandb/offline-run-*/*.wandb"))


def test_the_environment_names_what_produced_the_run():
    environment = describe_environment(1)
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or environment["versions"]["torch"] == torch.__version__
    )
    assert environment["processor"]
    json.dumps(environment)
