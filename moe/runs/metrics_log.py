"""`metrics.jsonl`: the metrics of a run, one JSON object a line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import Config
from moe.runs.tensorboard_mirror import TensorBoardMirror
from moe.runs.wandb_mirror import WandbMirror


class MetricsLog:
    """Appends to `metrics.jsonl`, the record of the run; copies go to W&B and TensorBoard if wanted.

    Args:
        path: the file; lines past `resume_step` are cut off, since they will be written again.
        resume_step: step of the checkpoint that the run continues from; 0 for a fresh run.
        config: of the run.
    """

    def __init__(self, path: Path, resume_step: int, config: Config):
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        scratch = path.with_suffix(".partial")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        scratch.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._mirrors: list[WandbMirror | TensorBoardMirror] = []
        if config.log.wandb != "disabled":
            self._mirrors.append(WandbMirror(config, path.parent))
        if config.log.tensorboard:
            self._mirrors.append(TensorBoardMirror(path.parent, resume_step))

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        for mirror in self._mirrors:
            mirror.write(_scalars(line))

    def close(self) -> None:
        """Close the file and wait for the mirrors; for W&B a limited time."""
        self._file.close()
        for mirror in self._mirrors:
            mirror.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a killed run left unfinished is ignored."""
    path, lines = Path(path), []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _scalars(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line whose lists, such as `moe/layers/max_vio`, are one key an element, `moe/layers/max_vio/0`."""
    parts: dict[str, Any] = {}
    for key, value in line.items():
        parts |= (
            {f"{key}/{i}": each for i, each in enumerate(value)} if isinstance(value, list) else {key: value}
        )
    return parts


def losses_by_text(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The `eval/NAME/loss` of an evaluation line, by NAME."""
    parts = {tuple(key.split("/")): value for key, value in evaluation.items()}
    return {key[1]: value for key, value in parts.items() if len(key) == 3 and key[::2] == ("eval", "loss")}
