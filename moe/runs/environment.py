"""`env.json`: the code, the libraries and the hardware that a run used."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import traceback
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moe.config import Config, ConfigError, first_line
from moe.distributed.agreement import on_all_ranks
from moe.distributed.launch import choose_device
from moe.runs.run_folder import RunFolder


def check_installed(config: Config) -> None:
    """Refuse `train.compile` and `log.tensorboard` if they cannot work.

    Raises:
        ConfigError: `train.compile` is set, the device is a CPU, and there is no C++ compiler; or
            `log.tensorboard` is set, and there is no TensorBoard.
    """
    if config.log.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("log.tensorboard", "needs a package; pip install tensorboard, or set it to false")
    on_cpu = choose_device(config.parallel).type == "cpu"
    if config.train.compile and on_cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise ConfigError("train.compile", "needs a C++ compiler on CPU; install g++ or set it to false")


def check_same_on_all_ranks(config: Config, fingerprint: str, tokenizer: str) -> None:
    """Nodes with files of their own must not train on different texts, or with different settings.

    Args:
        config: of the run.
        fingerprint: of the text and its tokens.
        tokenizer: as JSON.

    Raises:
        ConfigError: one of them differs between ranks.
    """
    settings = config.model_dump_json(exclude={"run": {"dir"}, "data": {"cache_dir"}})
    here = hashlib.sha256((settings + fingerprint + tokenizer).encode()).hexdigest()
    digests = on_all_ranks(lambda: here)
    if len(set(digests)) > 1:
        odd = next(i for i, there in enumerate(digests) if there != digests[0])
        problem = f"the text, the tokenizer or another key differs between ranks 0 and {odd}"
        raise ConfigError("data.source", f"{problem}; start all with the same files and arguments")


def compile_failure(error: BaseException, folder: RunFolder) -> str | None:
    """A line about a failure of torch.compile, with its traceback in `compile.log`; None for other errors."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return None
    folder.compile_log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return f"train.compile failed ({first_line(error)}); see {folder.compile_log}, or set it to false"


def describe_environment(num_ranks: int) -> dict[str, Any]:
    """What produced the run: code version, library versions, hardware, command."""
    root = Path(__file__).parents[2]
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
