"""YAML files and `section.key=value` overrides to a `Config` and back, with one-line errors."""

import argparse
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moe.config.schema import Config, ConfigError


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like those of the configuration."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def positive(text: str) -> float:
    """The argument of an option that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number above 0, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """The argument of an option that is a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, got {text!r}")
    return int(text)


def fraction(text: str) -> float:
    """The argument of an option that is a number above 0 and at most 1."""
    if positive(text) > 1:
        raise argparse.ArgumentTypeError(f"should be above 0 and at most 1, got {text!r}")
    return float(text)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides in order, validate.

    Args:
        path: the YAML file.
        overrides: items such as `moe.num_experts=16`; the value is parsed as YAML.

    Raises:
        ConfigError: anything wrong in the file or the overrides.
    """
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", f"cannot read {path} ({_reason(error)}); give a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError("CONFIG", f"{path} is not valid YAML ({first_line(error)}); mend it") from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError("CONFIG", f"{path} holds no sections; it should read like configs/tiny.yaml")
    for item in overrides:
        loaded = OmegaConf.merge(loaded, _parse_override(item))
    try:
        values = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError("CONFIG", f"{path}: {first_line(error)}") from None
    return parse_config(values)


def override_value(item: str) -> Any:
    """The value of an override such as `moe.num_experts=16`, read as `load_config` reads it.

    Raises:
        ConfigError: it is no override.
    """
    return OmegaConf.select(_parse_override(item), item.partition("=")[0])


def _parse_override(item: str) -> DictConfig:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(item, "is not section.key=value; see train.py --help")
    if "." not in key:
        raise ConfigError(key, f"names no section{_near_miss(key)}; overrides read section.key=value")
    try:
        return OmegaConf.from_dotlist([item])
    except yaml.YAMLError:  # a glob such as *.txt is no YAML; it is the text that it looks like
        override = OmegaConf.create()
        OmegaConf.update(override, key, text)
        return override
    except OmegaConfBaseException as error:
        raise ConfigError(key, f"cannot be set to this value ({first_line(error)})") from None


def parse_config(values: Any) -> Config:
    """Validate nested plain values (dicts, lists, numbers, strings, None).

    Raises:
        ConfigError: naming the first offending dotted key.
    """
    try:
        return Config.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise _one_line(error) from None


def dump_config(config: Config) -> str:
    """The complete configuration as YAML, every default filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flat_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value, in the order of the sections."""
    sections: Mapping[str, Mapping[str, Any]] = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def describe_keys() -> str:
    """One line per dotted key: type, default, meaning. The body of `train.py --help`."""
    rows = []
    for key, field in _fields():
        default = "" if field.default_factory else f"= {json.dumps(field.default)}"
        rows.append(f"  {key:<33} {_type_name(field):<24} {default:<14} {field.description}")
    return "\n".join(rows)


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, section in Config.model_fields.items():
        assert isinstance(section.annotation, type)
        assert issubclass(section.annotation, BaseModel)
        for key, field in section.annotation.model_fields.items():
            yield f"{name}.{key}", field


def _type_name(field: FieldInfo) -> str:
    name = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    for literal in ("typing.Literal[", "]", "'"):
        name = name.replace(literal, "") if "Literal" in str(field.annotation) else name
    return name.replace(", ", "|") if "Literal" in str(field.annotation) else name.replace("None", "null")


def _one_line(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "cross_field":
        key, _, message = first["msg"].partition(": ")
        return ConfigError(key, message)
    if first["type"] == "extra_forbidden":
        return ConfigError(key, f"no such key{_near_miss(key)}; train.py --help lists them all")
    if first["type"] == "string_pattern_mismatch":
        return ConfigError(
            key, f"may hold letters, digits, _, . and - only, got {json.dumps(first['input'])[:80]}"
        )
    message = first["msg"].replace("Input should be", "should be").replace("Value error, ", "")
    return ConfigError(key, f"{message}, got {json.dumps(first['input'], default=str)[:80]}")


def _near_miss(key: str) -> str:
    keys = [*Config.model_fields, *(known for known, _ in _fields())]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75) or [
        known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f", did you mean {near[0]}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not UTF-8 text"
