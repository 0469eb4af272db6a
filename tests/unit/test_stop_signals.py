"""Signals that ask to stop: which are caught, and what a lost terminal does to words."""

import os
import signal
from collections.abc import Iterator

import pytest

from infini_train.stop_signals import STOP_SIGNALS, _redirect_closed_terminals, catch_stop_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_signal_is_told_by_its_number() -> None:
    told: list[int] = []
    assert set(catch_stop_signals(told.append)) == set(STOP_SIGNALS)
    for number in STOP_SIGNALS:
        signal.raise_signal(number)
    assert told == list(STOP_SIGNALS)


def test_under_nohup_the_end_of_a_terminal_is_none_of_a_run() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    told: list[int] = []
    assert signal.SIGHUP not in catch_stop_signals(told.append)
    signal.raise_signal(signal.SIGHUP)
    assert told == []


def test_a_stream_of_a_terminal_that_is_gone_takes_words_and_drops_them() -> None:
    master, terminal = os.openpty()
    try:
        _redirect_closed_terminals([terminal])
        assert os.isatty(terminal), "a terminal that is there stays"
        os.close(master)
        with pytest.raises(OSError):
            os.write(terminal, b"lost")
        _redirect_closed_terminals([terminal])
        os.write(terminal, b"dropped")
    finally:
        os.close(terminal)
