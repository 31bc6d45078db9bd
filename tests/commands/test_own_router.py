"""A router from a file outside the project, named in the configuration."""

import json

import pytest
import torch

from moe.accounting.counts import count_parameters
from moe.config import load_config
from moe.doctor.layer_check import layer_error
from moe.inference.trained_run import load_run
from scripts import count
from tests.support.runs import assert_same_run, final_state

FILE = """
import torch
from moe import Router

class CosineRouter(Router):
    def __init__(self, d_model, moe):
        super().__init__(d_model, moe)
        self.log_temperature = torch.nn.Parameter(torch.zeros(1))

    def logits(self, hidden, weight=None):
        normalize = torch.nn.functional.normalize
        cosines = normalize(hidden, dim=1) @ normalize(self.weight, dim=1).to(hidden.dtype).T
        return cosines * torch.exp(self.log_temperature)

class PlainRouter(torch.nn.Module):
    def __init__(self, d_model, moe):
        super().__init__()
"""
OWN = "moe.router=cosine_router_of_a_test:CosineRouter"


@pytest.fixture
def in_a_folder_with_a_router(tmp_path, monkeypatch):
    (tmp_path / "cosine_router_of_a_test.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_a_folder_with_a_router")
def test_it_trains_counts_resumes_loads_and_passes_the_doctors_check(run_main, capsys):
    code, whole, _, err = run_main(OWN, folder="whole")
    assert code == 0, err
    temperature = final_state(whole)["weights/blocks.1.ffn.router.log_temperature"]
    assert temperature.abs() > 1e-4, "it is trained"
    _, part, _, _ = run_main(OWN, folder="part")
    (part / "summary.json").unlink()
    (part / "checkpoints" / "step-00000012" / "manifest.json").unlink()
    assert run_main(OWN, folder="part")[0] == 0
    assert_same_run(part, whole)
    run = load_run(whole, device="cpu")
    weights = sum(weight.numel() for weight in run.model.parameters())
    assert count_parameters(run.config).total == weights
    assert json.loads((whole / "summary.json").read_text())["params_total"] == weights
    capsys.readouterr()
    assert count.main([str(whole / "config.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == weights
    assert count_parameters(run.config).by_part["router"] == 2 * (4 * 32 + 1)
    assert layer_error(load_config(whole / "config.yaml"), torch.device("cpu")) < 1e-5


@pytest.mark.usefixtures("in_a_folder_with_a_router")
def test_one_without_biases_is_refused_if_biases_are_wanted(run_main):
    code, run, _, err = run_main("moe.router=cosine_router_of_a_test:PlainRouter", "moe.bias_update_rate=0.1")
    assert code == 2
    assert (
        "moe.bias_update_rate: cosine_router_of_a_test:PlainRouter has no buffer expert_bias; derive" in err
    )
    assert not (run / "config.yaml").exists()


@pytest.mark.parametrize("name", ["nowhere_at_all:Router", "json:Router"])
def test_one_that_is_not_there_is_refused_before_anything_is_written(run_main, name):
    code, run, _, err = run_main(f"moe.router={name}")
    assert code == 2
    assert err.startswith(f"error: moe.router: {name} cannot be imported (")
    assert "PYTHONPATH" in err
    assert err.count("\n") == 1
    assert not run.exists()
