"""Ctrl-C and SIGTERM as a request to stop after the current step."""

import signal
import sys


class StopRequest:
    """While it is entered, Ctrl-C or SIGTERM asks to stop after the step; a second Ctrl-C stops at once.

    A second SIGTERM does not: a scheduler and a launcher may each pass one on.

    Attributes:
        made: whether one of the signals has come.
    """

    def __init__(self) -> None:
        self.made = False
        self._interrupted = False

    def __enter__(self) -> "StopRequest":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and issubclass(error, Exception):
            return  # a launcher sends SIGTERM while this process still finds out which rank was lost
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self.made:
            print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        self.made = True
