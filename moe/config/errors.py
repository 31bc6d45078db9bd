"""The errors that reach a user as one line."""

from types import UnionType


class ConfigError(ValueError):
    """The user's input is wrong. The message is one line: the dotted key, what is wrong, and the fix."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}")
        self.key, self.message = key, message


def check_type(name: str, value: object, kind: type | UnionType) -> None:
    """Refuse an argument of another type.

    Raises:
        ConfigError: naming both types.
    """
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", kind)
        raise ConfigError(name, f"should be of type {expected}, got {type(value).__name__}")


class RunError(Exception):
    """The run itself failed. The message is one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
