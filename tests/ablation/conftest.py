import json
from pathlib import Path

import pytest

from moe.ablation.ablation_folder import AblationFolder
from moe.ablation.cells import StepTime, plan_cells
from moe.ablation.race import raced
from moe.config import load_config
from tests.support.finished_runs import SHAPES, write_run
from tests.support.paths import TINY


@pytest.fixture
def ablation(tmp_path):
    """Three seeds of each of `SHAPES`; the sparse ones are slower."""
    for name, (settings, losses) in SHAPES.items():
        for seed, loss in enumerate(losses):
            speed = 1000.0 if name == "dense" else 800.0
            write_run(tmp_path / f"{name}-{seed}", settings, seed, loss, speed)
    return tmp_path


@pytest.fixture
def race(tmp_path) -> Path:
    """A finished race of three seeds, planned for 1,200 steps of 1 s of the dense model.

    8 experts were measured at 1.2 s and get 1,000 steps, 16 at 1.5 s and get 800, which then took 1.6 s each.
    """
    config = load_config(TINY, ["model.vocab_size=1024"])
    folder, dense = AblationFolder(tmp_path), StepTime(1.0, 0.9, 1.1, 80)
    measured = {"num_experts=8": 1.2, "num_experts=16": 1.5, "dense,equal_active": 1.0}
    taken = measured | {"num_experts=16": 1.6}
    cells = plan_cells(config, {"moe.num_experts": [8, 16]}, "active_flops")
    cells = [
        raced(cell, StepTime(measured[cell.name], 0.9, 1.1, 80), dense)
        for cell in cells
        if cell.name in measured
    ]
    folder.add_plan(cells, [0, 1, 2], {"hold": "seconds", "race": {}})
    for cell in cells:
        shape = SHAPES["dense" if cell.is_dense else cell.name.partition("=")[2]]
        steps = cell.config.train.steps
        settings = [*shape[0], f"train.steps={steps}", f"optim.warmup_steps={cell.config.warmup_steps}"]
        for seed, loss in enumerate(shape[1]):
            run = folder.run(cell.name, seed)
            write_run(run.path, settings, seed, loss, 1024 / taken[cell.name])
            lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
            kept = [line for line in lines if line["step"] <= steps]
            run.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
            summary = json.loads(run.summary.read_text()) | {"tokens": steps * 1024}
            run.summary.write_text(json.dumps(summary))
    return tmp_path
