"""Load the model, the tokenizer and the configuration of a run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from moe.checkpoint.listing import list_checkpoints
from moe.checkpoint.manifest import CheckpointError
from moe.checkpoint.reading import Checkpoint, newest_checkpoint, open_checkpoint
from moe.config import Config, ConfigError, load_config
from moe.data.tokenizer import end_token, read_tokenizer
from moe.model.transformer import Transformer
from moe.runs.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedRun:
    """A trained run, from its newest checkpoint."""

    model: Transformer  # fp32, in evaluation mode
    tokenizer: Tokenizer
    config: Config
    end_id: int  # the token that ends a document


def load_run(
    path: str | Path, device: str | torch.device | None = None, step: int | None = None
) -> TrainedRun:
    """Load the newest sound checkpoint of a run.

    Args:
        path: a run folder, such as runs/tiny.
        device: of the model; None: that of `torch.accelerator` if there is one, or the CPU.
        step: of the checkpoint; None: the newest sound one.

    Raises:
        ConfigError: the folder is not a run, or holds no sound checkpoint, or there is no such device.
    """
    device = _device(device)
    folder = RunFolder(Path(path))
    if not folder.config.exists():
        raise ConfigError("RUN", f"{path} is not a run folder; give one of train.py, such as runs/tiny")
    config = load_config(folder.config)
    checkpoint = _checkpoint(folder, step)
    with torch.device("meta"):  # every weight comes from the checkpoint
        model = Transformer(config)
    model = model.to_empty(device=device)
    try:
        checkpoint.check_names("weights", {name: tuple(p.shape) for name, p in model.state_dict().items()})
    except CheckpointError as error:
        raise ConfigError("RUN", f"{error}; {folder.config} is of another model") from None
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(checkpoint.read("weights", name).view(weight.shape))
    tokenizer = read_tokenizer(folder.tokenizer, "RUN")
    end_id = tokenizer.token_to_id(end_token(tokenizer, config.data.end_token))
    assert end_id is not None
    return TrainedRun(model.eval(), tokenizer, config, end_id)


def earlier_step(path: str | Path) -> int | None:
    """The step of the last checkpoint before the newest one of a run; None if there is none."""
    steps = [step for step, _ in list_checkpoints(RunFolder(Path(path)).checkpoints)]
    return steps[1] if len(steps) > 1 else None


def _checkpoint(folder: RunFolder, step: int | None) -> Checkpoint:
    if step is not None:
        try:
            return open_checkpoint(folder.checkpoints, step, check_content=True)
        except (CheckpointError, OSError) as error:
            raise ConfigError("RUN", f"the checkpoint of step {step} cannot be loaded: {error}") from None
    checkpoint, warnings = newest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        raise ConfigError("RUN", warnings[0] if warnings else f"{folder.path} has no checkpoint yet")
    return checkpoint


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError("device", f"{device} cannot be used: {problem}") from None
