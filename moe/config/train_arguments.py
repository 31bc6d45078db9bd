"""The command line of train.py, read without torch, so that what is wrong with it is said at once."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from moe.config.command_line import DONE, OneLineParser, command
from moe.config.errors import ConfigError
from moe.config.loading import changed, dump_config, load_config
from moe.config.reference import help_text
from moe.config.schema import Config
from moe.config.sections import DataConfig

DEFAULT_CONFIG = Path("configs") / "tiny.yaml"  # in the folder of train.py
_YAML = (".yaml", ".yml")


def read_arguments(arguments: list[str], root: Path) -> Config | None:
    """The configuration that a command line names; None if something was printed instead.

    Args:
        arguments: a YAML file or a run's folder, at most one, and overrides, in any order; options.
        root: the folder that holds `DEFAULT_CONFIG`.

    Raises:
        ConfigError: anything wrong in the file or the overrides.
    """
    parser = OneLineParser(
        prog="train.py", description="Train a sparse mixture-of-experts language model.", add_help=False
    )
    items_help = f"a YAML file (default {DEFAULT_CONFIG}) or a run's folder, and overrides, in any order"
    parser.add_argument("items", nargs="*", metavar="CONFIG | RUN | key=value", help=items_help)
    help_help = "print this and all keys, or those of a section such as moe, or a key such as optim.lr; exit"
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION | KEY", help=help_help)
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    options = parser.parse_intermixed_args(arguments)
    if options.help is not None:
        keys = help_text(options.help)
        print(keys if options.help else f"{parser.format_help()}\nkeys, with their defaults:\n{keys}")
        return None
    overrides = [item for item in options.items if _is_override(item)]
    paths = [item for item in options.items if item not in overrides]
    if len(paths) > 1:
        fix = "give one; overrides read section.key=value"
        raise ConfigError("CONFIG", f"{paths[0]} and {paths[1]} are two configurations; {fix}")
    path, run = Path(paths[0]) if paths else root / DEFAULT_CONFIG, None
    if path.is_dir():
        if not (path / "config.yaml").is_file():
            fix = "give one such as runs/tiny, or a YAML file"
            raise ConfigError("RUN", f"{path} is not a run's folder; {fix}; {_as_source(path)}")
        path, run = path / "config.yaml", path
    elif path.is_file() and path.suffix not in _YAML:
        raise ConfigError("CONFIG", f"{path} is not a YAML file; {_as_source(path)}")
    config = load_config(path, overrides)
    if run is not None:  # which may have been moved since it began
        config = changed(config, {"run.dir": str(run)})
    if options.print_config:
        print(dump_config(config), end="")
        return None
    return config


def check_arguments(check_data: Callable[[DataConfig], None]) -> None:
    """End this process if its command line is wrong or asks for help; else say that it starts.

    Args:
        check_data: refuses a section `data` whose files are not here.
    """

    @command
    def say_what_is_wrong(arguments: list[str]) -> int:
        config = read_arguments(arguments, Path(sys.argv[0]).parent)
        if config is None:
            sys.exit(DONE)
        check_data(config.data)
        if os.environ.get("RANK", "0") == "0":
            print(f"{config.run.dir}: loading PyTorch and DeepSpeed", flush=True)
        return DONE

    if code := say_what_is_wrong(sys.argv[1:]):
        sys.exit(code)


def _as_source(path: Path) -> str:
    return f"to train on its text, write data.source={path}"


def _is_override(item: str) -> bool:
    """Whether an item is an override. A path can have an equals sign too, as in `runs/num_experts=8`."""
    if item.endswith(_YAML) or Path(item).exists():
        return False
    return "=" in item or item.partition(".")[0] in Config.model_fields  # without a value it is refused later
