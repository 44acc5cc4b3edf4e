"""The first signal asks, the second aborts, and the handlers of before come back."""

import signal

import pytest

from nsa_launch.stop_signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_asks_second_aborts(number):
    asked = []
    before = signal.getsignal(number)
    with StopSignals(asked.append) as signals:
        signal.raise_signal(number)
        assert (asked, signals.received, signals.aborted) == ([number], number, False)
        signal.raise_signal(number)
        assert (asked, signals.received, signals.aborted) == ([number], number, True)
    assert signal.getsignal(number) is before


def test_installing_again_takes_the_signals_back():
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(asked.append) as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library might
        signals.install()
        signal.raise_signal(signal.SIGTERM)
    assert asked == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
