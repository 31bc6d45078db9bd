"""Ctrl-C and SIGTERM as a request to stop."""

import signal

import pytest

from moe.training.stop_request import StopRequest


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request_and_is_answered_in_one_line(first, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        assert not stop.made
        signal.raise_signal(first)
        assert stop.made
        signal.raise_signal(signal.SIGTERM)  # a scheduler and a launcher may each pass one on
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert capsys.readouterr().err == "stopping after this step; Ctrl-C again stops at once\n"


def test_a_second_ctrl_c_stops_at_once_and_the_handlers_are_those_from_before():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_after_an_error_sigterm_does_not_end_the_process_before_it_says_what_went_wrong():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(RuntimeError, match="a rank is lost"), StopRequest():
            raise RuntimeError("a rank is lost")
        signal.raise_signal(
            signal.SIGTERM
        )  # from the launcher: without the handler it would end this process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
