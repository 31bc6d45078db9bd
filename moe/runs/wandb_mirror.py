"""A best-effort copy of the metrics on Weights & Biases."""

import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe.config import Config, first_line, flat_config

_PATIENCE_S = 30.0


class WandbMirror:
    """Best-effort copy of the metrics on Weights & Biases, from a thread of its own.

    Whether W&B fails, blocks or is offline, training neither waits nor stops. The first error is printed and
    ends the mirror.
    """

    def __init__(self, config: Config, folder: Path):
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(config, folder), daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Queue one line."""
        self._lines.put(dict(line))

    def close(self) -> None:
        """Wait until the queue is sent, for at most half a minute."""
        self._lines.put(None)
        self._thread.join(_PATIENCE_S)

    def _run(self, config: Config, folder: Path) -> None:
        try:
            import wandb

            if config.log.wandb == "online" and wandb.api.api_key is None:
                raise ValueError("no API key; run wandb login")  # or wandb asks for it and waits
            run = wandb.init(
                project=config.log.wandb_project,
                name=config.run.name,
                dir=folder,
                mode=config.log.wandb,
                config=flat_config(config),
                settings=wandb.Settings(silent=True, init_timeout=_PATIENCE_S),
            )
            while (line := self._lines.get()) is not None:
                run.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
            run.finish()
        except Exception as error:  # best effort by contract
            print(
                f"W&B stopped ({first_line(error)}); training continues, metrics.jsonl is complete",
                file=sys.stderr,
            )
