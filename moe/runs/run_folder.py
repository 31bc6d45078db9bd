"""The folder of a run: where each of its files lies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import Config, ConfigError, dump_config


class RunFolder:
    """Paths of one run.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"  # complete, with every default filled in
        self.environment = path / "env.json"  # code version, library versions and hardware
        self.metrics = path / "metrics.jsonl"  # one JSON object a line
        self.summary = path / "summary.json"  # final figures; it exists once the run is finished
        self.loss_plot = path / "loss.png"  # training and validation loss
        self.sample = path / "sample.txt"  # text from the final model
        self.tokenizer = path / "tokenizer.json"  # in the format of the `tokenizers` library
        self.checkpoints = path / "checkpoints"  # a folder per checkpoint

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json` atomically."""
        scratch = self.summary.with_suffix(".partial")
        scratch.write_text(json.dumps(summary, indent=1))
        scratch.replace(self.summary)

    def create(self, config: Config) -> None:
        """Make the folder, write the configuration, and remove the results of an earlier, shorter run.

        Raises:
            ConfigError: the file system refuses.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.config.write_text(dump_config(config))
            for result in (self.summary, self.loss_plot, self.sample):
                result.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError("run.dir", f"cannot write to {self.path} ({error.strerror})") from None
