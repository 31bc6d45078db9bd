"""Calling the `main` of a command in this process."""

from collections.abc import Callable
from typing import Any

Main = Callable[[list[str]], int]


def exit_code(main: Main, arguments: list[str]) -> object:
    """What the command would exit with, also where its parser ends the process."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def assert_refused(main: Main, arguments: list[str], expected: str, capsys: Any) -> None:
    """It exits with 2 and prints one line, on stderr, which begins with `expected`."""
    code = exit_code(main, arguments)
    printed = capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith(expected)
