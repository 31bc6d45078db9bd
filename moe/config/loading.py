"""YAML files and `section.key=value` overrides to a `Config` and back, with one-line errors."""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from moe.config.errors import ConfigError, first_line
from moe.config.schema import Config, config_fields

_WRONG_TYPES = ("int_type", "int_from_float", "float_type", "bool_type", "list_type", "tuple_type", "missing")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides in order, validate.

    Args:
        path: the YAML file.
        overrides: items such as `moe.num_experts=16`; the value is parsed as YAML.

    Raises:
        ConfigError: anything wrong in the file or the overrides.
    """
    if isinstance(overrides, str | Mapping):
        raise ConfigError("overrides", f'should be a list such as ["moe.num_experts=16"], got {overrides!r}')
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", f"cannot read {path} ({_reason(error)}); give a YAML file") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError("CONFIG", f"{path} is not valid YAML ({first_line(error)}); fix it") from None
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
        ConfigError: it is not an override.
    """
    return OmegaConf.select(_parse_override(item), item.partition("=")[0])


def _parse_override(item: str) -> DictConfig:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(item, "is not section.key=value; see train.py --help")
    if key in Config.model_fields:
        raise ConfigError(key, f"names no key of this section; write one such as {_first_key(key)}=VALUE")
    if "." not in key:
        raise ConfigError(key, f"names no section{_near_miss(key)}; overrides read section.key=value")
    try:
        return OmegaConf.from_dotlist([item])
    except yaml.YAMLError:  # a glob such as *.txt is not YAML; take it as text
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
        return Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise _one_line(error) from None


def dump_config(config: Config) -> str:
    """The complete configuration as YAML, every default filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with some dotted keys changed, checked again as a whole.

    Raises:
        ConfigError: the result is not valid.
    """
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return parse_config(values)


def flat_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value, in the order of the sections."""
    sections: Mapping[str, Mapping[str, Any]] = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _one_line(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    if first["type"] == "conflict":
        conflict = first.get("ctx", {})
        return ConfigError(conflict["key"], conflict["message"])
    if first["type"] == "extra_forbidden":
        return ConfigError(key, f"no such key{_near_miss(key)}; train.py --help lists them all")
    if first["type"] == "string_pattern_mismatch":
        return ConfigError(
            key, f"may hold letters, digits, _, . and -, got {json.dumps(first['input'])[:80]}"
        )
    message = first["msg"].replace("Input should be", "should be").replace("Value error, ", "")
    message = message.replace(", got a number with a fractional part", "")
    got = json.dumps(first["input"], default=str)[:80]
    return ConfigError(key, f"{message}, got {got}{_right_value(key, first['type'], first['input'])}")


def _right_value(key: str, problem: str, value: Any) -> str:
    """What to write instead of a value of the wrong type: what was meant, or the default as an example."""
    field = config_fields().get(key)
    if field is None or problem not in _WRONG_TYPES:
        return ""
    if problem in ("list_type", "tuple_type") and isinstance(value, str):
        return f"; write [{value}]"
    if problem == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {value:.0f}"
    if field.default is None:
        return "; for none, write null"
    return "" if field.default_factory else f"; write one such as {json.dumps(field.default)}"


def _first_key(section: str) -> str:
    return next(key for key in config_fields() if key.startswith(f"{section}."))


def _near_miss(key: str) -> str:
    keys = [*Config.model_fields, *config_fields()]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75) or [
        known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f", did you mean {near[0]}?" if near else ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or "not UTF-8 text"
