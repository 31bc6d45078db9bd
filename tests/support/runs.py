"""Finished runs: what they logged and what they saved, to be compared."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint.reading import newest_checkpoint


def read_lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings, which differ from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def final_state(run: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, as kind/name."""
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    assert checkpoint is not None
    return {
        f"{kind}/{name}": checkpoint.read(kind, name).view(entry.shape)
        for kind, named in checkpoint.tensors.items()
        for name, entry in named.items()
    }


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit: every logged figure but the timings, and the whole final state."""
    assert read_lines(run) == read_lines(other)
    state, other_state = final_state(run), final_state(other)
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name
