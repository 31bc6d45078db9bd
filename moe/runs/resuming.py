"""Whether a folder may be used for a run, and whether the run in it may be continued."""

import tempfile
from pathlib import Path

from moe.checkpoint.listing import list_checkpoints
from moe.checkpoint.reading import newest_checkpoint
from moe.config import (
    Config,
    ConfigError,
    changed,
    flat_config,
    load_config,
    on_resume,
    parse_config,
    unused_keys,
)
from moe.runs.run_folder import RunFolder


def open_run(config: Config) -> RunFolder:
    """Look at the run's folder, writing nothing.

    Raises:
        ConfigError: the folder cannot hold this run, holds another one, or is being trained.
    """
    folder = RunFolder(Path(config.run.dir).expanduser())
    _check_usable(folder)
    if folder.is_in_use():
        raise folder.in_use_error()
    check_continues(config, folder)
    return folder


def check_continues(config: Config, folder: RunFolder) -> None:
    """Refuse a configuration that cannot continue what the folder holds.

    Of checkpoints, only the manifests are read here; `newest_checkpoint` checks the content.

    Raises:
        ConfigError: naming the key.
    """
    if folder.config.exists() and config.run.resume == "never":
        raise ConfigError("run.resume", f"never, but {folder.path} holds a run; choose another run.name")
    checkpoint, warnings = newest_checkpoint(folder.checkpoints, check_content=False)
    if checkpoint is None and warnings:
        raise all_damaged(warnings)
    if checkpoint is None and folder.summary.exists():
        problem = f"{folder.path} is a finished run whose checkpoints are gone"
        raise ConfigError("run.dir", f"{problem}; choose another run.name")
    if checkpoint is None and config.run.resume == "must":
        raise ConfigError("run.resume", f"must, but {folder.path} holds no checkpoint; set it to auto")
    if checkpoint is not None:
        _check_same_experiment(config, parse_config(checkpoint.config))
        if checkpoint.step > config.train.steps:
            problem = f"{config.train.steps}, but the run is already at step {checkpoint.step}"
            raise ConfigError("train.steps", f"{problem}; raise it or choose another run.name")


def with_recorded_revisions(config: Config, folder: RunFolder) -> Config:
    """The configuration with the commits of hub data that the run in this folder began with.

    Commits that the configuration names itself stay.
    """
    if not folder.config.exists():
        return config
    new, saved = flat_config(config), flat_config(load_config(folder.config))
    of = {
        "data.revision": "data.source",
        "data.source_revisions": "data.sources",
        "data.tokenizer_revision": "data.tokenizer",
    }
    return changed(
        config, {key: saved[key] for key, name in of.items() if not new[key] and new[name] == saved[name]}
    )


def what_is_saved(folder: RunFolder) -> str:
    """What can be loaded of a run that ends early."""
    saved = list_checkpoints(folder.checkpoints)
    return f"the checkpoint of step {saved[0][0]} can be loaded" if saved else "no checkpoint was saved yet"


def all_damaged(warnings: list[str]) -> ConfigError:
    """The error for a run whose checkpoints are all damaged."""
    problem = warnings[0].split("; ")[0]
    return ConfigError("run.dir", f"{problem}, and so is every other one; choose another run.name")


def _check_usable(folder: RunFolder) -> None:
    path = folder.path
    if path.is_dir():
        if not folder.is_empty() and not _is_run(folder):
            raise ConfigError("run.dir", f"{path} holds other files and no run; choose a new folder")
    elif path.exists():
        raise ConfigError("run.dir", f"{path} is a file; choose a folder")
    parent = path.absolute()
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()  # root passes permission checks but not this one
    except OSError as error:
        raise ConfigError("run.dir", f"{path} cannot be written ({error.strerror}); choose another") from None


def _is_run(folder: RunFolder) -> bool:
    try:
        load_config(folder.config)
    except ConfigError:
        return False
    return True


def sets_results(key: str, config: Config) -> bool:
    """Whether finished runs that differ in this key have different results; rounding is not looked at.

    With a capacity, an expert takes its share of each micro batch, which so decides what is dropped.
    """
    drops = config.moe.capacity_factor is not None and not config.moe.is_dense
    return on_resume(key) != "free" or (drops and key == "train.micro_batch_size")


def _check_same_experiment(new: Config, saved: Config) -> None:
    new_values, saved_values = flat_config(new), flat_config(saved)
    if new_values["model.vocab_size"] is None:  # it will come from the same tokenizer
        del saved_values["model.vocab_size"]
    unused = unused_keys(new) & unused_keys(saved)
    different = [
        key
        for key, value in saved_values.items()
        if on_resume(key) != "extends"
        and sets_results(key, saved)
        and new_values[key] != value
        and key not in unused
    ]
    if different:
        keys = ", ".join(f"{key} (was {saved_values[key]!r}, now {new_values[key]!r})" for key in different)
        problem = f"differs from the run in {new.run.dir}: {keys}"
        raise ConfigError(different[0], f"{problem}; restore it, or choose another run.name")
