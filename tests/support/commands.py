"""Calling the `main` of a command in this process."""

from collections.abc import Callable


def exit_code(main: Callable[[list[str]], int], arguments: list[str]) -> object:
    """What the command would exit with, also where its parser ends the process."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code
