"""What a run reports: router metrics, the metrics file, its mirror on Weights & Biases, the environment."""

import json
import os
import platform
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.config.loading import first_line, flat_config
from moe.config.schema import Config
from moe.model.moe_layer import MoEAux

_WANDB_PATIENCE_S = 30.0


class StepMeter:
    """Sums of one global batch, kept on the device until they are read, once a step.

    Args:
        device: where the losses live.
    """

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._counts: Tensor | None = None
        self._dropped = torch.zeros((), dtype=torch.float64, device=device)
        self._bytes = torch.zeros((), dtype=torch.int64, device=device)
        self._forwards = 0

    def add(self, lm_loss: Tensor, aux: MoEAux | None) -> None:
        """Add one micro batch: its mean cross-entropy in nats per token, and the layers' reports."""
        self._forwards += 1
        self._sums[0] += lm_loss.detach()
        if aux is not None:
            self._sums[1] += aux.load_balancing_loss.detach().mean()
            self._sums[2] += aux.router_z_loss.detach().mean()
            self._sums[3] += aux.router_entropy.mean()
            self._counts = aux.tokens_per_expert + (0 if self._counts is None else self._counts)
            self._dropped += aux.dropped_tokens.sum()
            self._bytes += aux.dispatch_bytes.sum()

    def tensors(self) -> Iterator[Tensor]:
        """The sums, to be added up over ranks in place."""
        yield self._sums
        yield self._dropped
        yield self._bytes
        if self._counts is not None:
            yield self._counts

    def read(self, num_ranks: int) -> dict[str, float | None]:
        """The step's losses and router metrics, under the names of `metrics.jsonl`; null in a dense model."""
        lm_loss, balance, z_loss, entropy = (self._sums / (self._forwards * num_ranks)).tolist()
        if self._counts is None:
            names = ("loss/load_balancing", "loss/router_z", *_ROUTER_METRICS)
            return {"loss/lm": lm_loss, **dict.fromkeys(names)}
        counts_LE = self._counts.double()
        return {
            "loss/lm": lm_loss,
            "loss/load_balancing": balance,
            "loss/router_z": z_loss,
            "moe/load_imbalance": float((counts_LE.amax(1) / counts_LE.mean(1)).mean()),
            "moe/dropped_fraction": float(self._dropped / counts_LE.sum()),
            "moe/router_entropy": entropy,
            "moe/dead_experts": int((counts_LE == 0).sum()),
            "comm/dispatch_bytes": int(self._bytes),
        }


_ROUTER_METRICS = (
    "moe/load_imbalance",
    "moe/dropped_fraction",
    "moe/router_entropy",
    "moe/dead_experts",
    "comm/dispatch_bytes",
)


class MetricsLog:
    """Appends to `metrics.jsonl`, the record of the run, and mirrors each line to W&B if asked to.

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
        self._mirror = WandbMirror(config, path.parent) if config.log.wandb != "disabled" else None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; it is on disk when this returns."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.write(line)

    def close(self) -> None:
        """Close the file and wait for the mirror, within its patience."""
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a killed run left unfinished is ignored."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class WandbMirror:
    """Best-effort copy of the metrics on Weights & Biases, from a thread of its own.

    Whatever W&B does (fail, block, be offline), training neither waits nor stops; the first error is printed
    and ends the mirror.
    """

    def __init__(self, config: Config, folder: Path):
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(config, folder), daemon=True)
        self._thread.start()

    def write(self, line: Mapping[str, Any]) -> None:
        """Queue one line."""
        self._lines.put(dict(line))

    def close(self) -> None:
        """Wait until the queue is sent, at most half a minute."""
        self._lines.put(None)
        self._thread.join(_WANDB_PATIENCE_S)

    def _run(self, config: Config, folder: Path) -> None:
        try:
            import wandb

            if config.log.wandb == "online" and wandb.api.api_key is None:
                raise ValueError("no API key; run wandb login")  # else it would ask on the terminal and wait
            run = wandb.init(
                project=config.log.wandb_project,
                name=config.run.name,
                dir=folder,
                mode=config.log.wandb,
                config=flat_config(config),
                settings=wandb.Settings(silent=True, init_timeout=_WANDB_PATIENCE_S),
            )
            while (line := self._lines.get()) is not None:
                run.log({key: value for key, value in line.items() if value is not None}, step=line["step"])
            run.finish()
        except Exception as error:  # best effort by contract
            print(
                f"W&B stopped ({first_line(error)}); training goes on, metrics.jsonl is complete",
                file=sys.stderr,
            )


def describe_environment(num_ranks: int) -> dict[str, Any]:
    """What produced the run: code version, library versions, hardware, command."""
    root = Path(__file__).parent.parent
    has_cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "ranks": num_ranks,
        "git_sha": _git(root, "rev-parse", "HEAD"),
        "git_dirty": None if (status := _git(root, "status", "--porcelain")) is None else bool(status),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "tokenizers", "numpy")},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_cuda else None,
    }


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *command], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
