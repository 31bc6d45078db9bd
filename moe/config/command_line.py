"""What all commands share: a parser with one-line errors, option types, and exit codes."""

import argparse
import io
import math
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn

from moe.config.errors import ConfigError, RunError

# A thread that waits for work spins this often before it sleeps (GNU OpenMP, which reads it when torch is
# imported). By its own default a run beside two others took 8.9 s a step, with this 0.8; alone it costs 2 %.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Exit codes. The last two are those that a shell gives to a program that Ctrl-C or a closed pipe has ended.
DONE, FAILED, WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Decorate the `main` of a command: its errors become one line on stderr and an exit code.

    What the encoding of the terminal lacks is printed as a question mark.
    """

    @wraps(main)
    def with_exit_code(arguments: list[str]) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = main(arguments)
            sys.stdout.flush()
            return code
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return WRONG_INPUT
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # such as: count.py ... | head -3
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
            return BROKEN_PIPE

    return with_exit_code


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end this process with one line until its `main` begins: imports have nothing to clean up."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


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
