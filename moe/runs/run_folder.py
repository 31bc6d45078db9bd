"""The folder of a run: whether it may be used, what it holds, and what a resumed run may change.

config.yaml  env.json  metrics.jsonl  summary.json  loss.png  sample.txt  tokenizer.json  checkpoints/
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.checkpoint.saving import newest_checkpoint
from moe.config.loading import dump_config, flat_config, load_config, parse_config
from moe.config.schema import Config, ConfigError

# What a resumed run may change without becoming another experiment.
_FREE_SECTIONS = (
    "parallel.",
    "log.",
    "cost.",
    "run.name",
    "run.dir",
    "run.resume",
    "data.cache_dir",
    "data.revision",
)
_FREE_KEYS = {
    "train.steps",
    "train.micro_batch_size",
    "train.eval_interval",
    "train.checkpoint_interval",
    "train.keep_checkpoints",
    "train.activation_checkpointing",
    "train.compile",
}


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The complete configuration."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Code version, library versions and hardware."""
        return self.path / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: the record of the run."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Final figures; it exists once the run is finished."""
        return self.path / "summary.json"

    @property
    def loss_plot(self) -> Path:
        """Training and validation loss."""
        return self.path / "loss.png"

    @property
    def sample(self) -> Path:
        """Text from the final model."""
        return self.path / "sample.txt"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer in the `tokenizers` library's JSON format."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, in one piece: who finds it finds all of it."""
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


def open_run(config: Config) -> RunFolder:
    """Look at the run's folder, writing nothing.

    Of checkpoints, only the manifests are read here; `newest_checkpoint` checks the content.

    Raises:
        ConfigError: the folder is no place for this run, or the run is not the one that was saved.
    """
    folder = RunFolder(Path(config.run.dir).expanduser())
    _check_usable(folder)
    if folder.config.exists() and config.run.resume == "never":
        raise ConfigError(
            "run.resume", f"never, but {folder.path} already holds a run; choose another run.name"
        )
    checkpoint, warnings = newest_checkpoint(folder.checkpoints, check_content=False)
    if checkpoint is None and warnings:
        raise all_damaged(warnings)
    if checkpoint is None and folder.summary.exists():
        raise ConfigError(
            "run.dir", f"{folder.path} is a finished run whose checkpoints are gone; choose another run.name"
        )
    if checkpoint is None and config.run.resume == "must":
        raise ConfigError("run.resume", f"must, but {folder.path} holds no checkpoint; set it to auto")
    if checkpoint is not None:
        _check_same_experiment(config, parse_config(checkpoint.config))
        if checkpoint.step > config.train.steps:
            raise ConfigError(
                "train.steps",
                f"{config.train.steps}, but the run is already at step {checkpoint.step}; raise it "
                "or choose another run.name",
            )
    return folder


def all_damaged(warnings: list[str]) -> ConfigError:
    """The refusal of a run that no checkpoint can continue."""
    problem = warnings[0].split("; ")[0]
    return ConfigError("run.dir", f"{problem}, and so is every other one; choose another run.name")


def _check_usable(folder: RunFolder) -> None:
    path = folder.path
    if path.is_dir():
        if any(path.iterdir()) and not _is_run(folder):
            raise ConfigError(
                "run.dir", f"{path} holds files that are no run's; choose an empty or new folder"
            )
    elif path.exists():
        raise ConfigError("run.dir", f"{path} is a file; choose a folder")
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()  # asks the file system itself, whoever the user is
    except OSError as error:
        raise ConfigError("run.dir", f"{path} cannot be written ({error.strerror}); choose another") from None


def _is_run(folder: RunFolder) -> bool:
    try:
        load_config(folder.config)
    except ConfigError:
        return False
    return True


def _may_change(key: str) -> bool:
    return key in _FREE_KEYS or key.startswith(_FREE_SECTIONS)


def sets_results(key: str) -> bool:
    """Whether finished runs that differ in a key are different experiments; rounding is not looked at."""
    return not _may_change(key) or key in ("train.steps", "parallel.precision")


def _check_same_experiment(new: Config, saved: Config) -> None:
    changed: list[tuple[str, Any, Any]] = []
    new_values = flat_config(new)
    for key, old_value in flat_config(saved).items():
        free = _may_change(key)
        from_tokenizer = key == "model.vocab_size" and new_values[key] is None
        if not free and not from_tokenizer and new_values[key] != old_value:
            changed.append((key, old_value, new_values[key]))
    if changed:
        keys = ", ".join(f"{key} (was {old!r}, now {now!r})" for key, old, now in changed)
        raise ConfigError(
            changed[0][0],
            f"differs from the run in {new.run.dir}: {keys}; restore it, or choose another run.name",
        )
