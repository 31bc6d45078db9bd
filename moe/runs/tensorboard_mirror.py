"""A copy of the metrics for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"  # in that of the run


class TensorBoardMirror:
    """Writes each metric of a line as a scalar.

    Args:
        folder: of the run.
        resume_step: TensorBoard leaves out what was written of later steps.
    """

    def __init__(self, folder: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

        self._writer = SummaryWriter(folder / FOLDER, purge_step=resume_step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line of `metrics.jsonl`; null is left out."""
        for name, value in line.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()
