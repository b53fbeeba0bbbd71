"""The first signal is only noted, the second ends the process, and outside of the block they mean what they meant."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from fastgrpo.stopping import ASKING, Stopped, StopSignals


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals have their usual effect, also where the tests run in the background of a shell, which ignores Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_noted_until_it_is_asked_for(number: signal.Signals, heeded: None) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped, match=f"^by {number.name}$") as stopped:
            signals.check()
    assert stopped.value.number == number and signal.getsignal(number) == before


def test_a_second_signal_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with StopSignals():
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            signals.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_leaves_the_handlers_alone() -> None:
    failed = []

    def use() -> None:
        try:
            with StopSignals():
                pass
        except ValueError as error:
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failed
