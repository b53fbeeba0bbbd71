"""A run that is asked to end, by SIGTERM from a cluster or by Ctrl-C, ends where its state can be saved.

    with StopSignals() as signals:
        ...                     a signal is only noted
        signals.check()         Stopped, if one came

A second signal ends the process at once.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

ASKING = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was asked to end; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Notes the first of the signals that ask a process to end; 0 in `received` until there is one."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.received = 0
        if threading.current_thread() is threading.main_thread():  # Python knows handlers in no other
            ours = [number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._receive) for number in ours}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        if self.received:
            raise Stopped(self.received)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received:
            self.__exit__()
            os.kill(os.getpid(), number)
        self.received = number
