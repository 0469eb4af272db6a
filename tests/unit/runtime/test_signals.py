"""Stop signals: which are caught, and where output goes when the terminal is closed."""

import os
import signal
from collections.abc import Iterator

import pytest

from infini_train.runtime.signals import STOP_SIGNALS, _redirect_closed_terminals, catch_stop_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_handler_gets_the_signal_number() -> None:
    told: list[int] = []
    assert set(catch_stop_signals(told.append)) == set(STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.raise_signal(number)
    assert told == list(STOP_SIGNALS)


def test_sighup_stays_ignored_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    told: list[int] = []
    assert signal.SIGHUP not in catch_stop_signals(told.append)
    signal.raise_signal(signal.SIGHUP)
    assert told == []


def test_output_to_a_closed_terminal_is_dropped() -> None:
    master, terminal = os.openpty()
    try:
        _redirect_closed_terminals([terminal])
        assert os.isatty(terminal), "an open terminal must not be redirected"
        os.close(master)
        with pytest.raises(OSError):
            os.write(terminal, b"lost")
        _redirect_closed_terminals([terminal])
        os.write(terminal, b"dropped")
    finally:
        os.close(terminal)
