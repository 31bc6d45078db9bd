"""Folders that look like finished runs, with losses that a test chooses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.ablation.comparison import Comparison, compare
from moe.ablation.results import read_runs
from moe.config import Config, dump_config, load_config
from tests.support.paths import TINY

SHAPES = {  # losses of seeds 0, 1, 2
    "dense": (["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=512"], (3.00, 3.04, 2.96)),
    "dense,large": (["moe.num_experts=1", "moe.top_k=1", "moe.d_ff_expert=2048"], (2.80, 2.85, 2.76)),
    "4": (["moe.num_experts=4"], (2.95, 3.00, 2.90)),
    "8": (["moe.num_experts=8"], (2.90, 2.94, 2.86)),
    "16": (["moe.num_experts=16"], (2.91, 2.90, 2.88)),
}

COST = {"device_hours": 0.5, "usd": 1.5, "kwh": None, "tco2e": None}


def comparisons_of(folder: Path) -> list[Comparison]:
    """What all finished runs below a folder show."""
    return compare(read_runs(folder)[0])


def config_of(settings: Sequence[str]) -> Config:
    """tiny.yaml with these overrides."""
    return load_config(TINY, ["model.vocab_size=1024", *settings])


def write_run(
    folder: Path, settings: Sequence[str], seed: int, loss: float, tokens_per_s: float = 1000.0
) -> None:
    """The files of a finished run that ends with this validation loss."""
    folder.mkdir(parents=True)
    config = config_of([*settings, f"run.seed={seed}", f"run.dir='{folder}'"])
    (folder / "config.yaml").write_text(dump_config(config))
    lines = []
    for step in range(100, 1300, 100):
        line: dict[str, Any] = {
            "step": step,
            "tokens": step * 1024,
            "loss/lm": 4.0,
            "perf/step_s": 1024 / tokens_per_s,
        }
        if not config.moe.is_dense:
            line |= {"moe/load_imbalance": 2.0 if step == 1200 else 9.0, "moe/router_entropy": 1.5}
            line |= {"moe/dead_experts": 0, "moe/dropped_fraction": 0.0}
        lines += [line, {"step": step, "tokens": step * 1024, "eval/loss": loss + 100 / step}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"final_eval_loss": loss, "final_bits_per_byte": loss / 2, "tokens": 1228800}
    (folder / "summary.json").write_text(json.dumps(summary | {"tokens_per_s": tokens_per_s, "cost": COST}))
