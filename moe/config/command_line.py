"""What all commands share: a parser with one-line errors, option types, and exit codes."""

import argparse
import math
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn

from moe.config.errors import ConfigError, RunError

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit codes; 130: Ctrl-C


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate the `main` of a command: its errors become one line on stderr and an exit code."""

    @wraps(main)
    def with_exit_code(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_INPUT
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED

    return with_exit_code


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
