"""A run that has to end, by a signal or because its launcher or another rank is gone, ends where its state can be saved.

    with Watch(grace=20, end=save_and_exit) as watch:
        ...                     what has come is only noted
        watch.check()           raises it: Stopped, LostRank or EndedElsewhere
        watch.ending()          from here on this thread ends the run itself

The thread of the run may be waiting for a device or for another rank, where no signal reaches Python. A thread beside it
therefore reads signals from a pipe. Where the run does not begin to end by itself in time, it calls `end`, which saves what
is in memory and ends the process; and whatever happens, the process is over `grace` seconds after a signal.

A second signal ends the process at once, but not under a launcher, which passes on what its ranks have had already.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fastgrpo.processes import launchers, started

ASKING = (signal.SIGTERM, signal.SIGINT)
TICK = 0.5  # seconds between two looks for the launcher
SHORT = 2.0  # seconds that a run has to begin to end where it cannot go on: another rank is gone


class Stopped(Exception):
    """The run was asked to end; `number` is the signal's."""

    def __init__(self, number: int, why: str = "") -> None:
        super().__init__(why or f"by {signal.Signals(number).name}")
        self.number = number


class LostRank(Exception):
    """Another process of the run is gone, or gives no sign of life."""


class EndedElsewhere(Exception):
    """Another rank ends the run, and this one cannot go on alone; `status` is that rank's exit status."""

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.status = status


class Watch:
    """Notes the first thing that asks a run to end.

    grace: seconds from a signal to the end of the process.
    end: called with what came, in another thread, where the run's own has not begun to end; it must end the process.
    """

    def __init__(self, grace: float, end: Callable[[Exception], None]) -> None:
        self.grace, self._end = grace, end
        self.cause: Exception | None = None
        self.came = 0.0  # when, by the monotonic clock
        self._is_ending, self._over = threading.Event(), threading.Event()
        self._before: dict[int, Any] = {}
        self._last_moment: threading.Timer | None = None
        self._launchers = launchers()

    def __enter__(self) -> "Watch":
        self.cause = None
        self._is_ending.clear()
        self._over.clear()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        if threading.current_thread() is threading.main_thread():  # Python knows handlers in no other
            ours = [number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN]
            self._before_descriptor = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, lambda *_: None) for number in ours}
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        os.write(self._writing, b"\0")
        self._thread.join()
        if self._last_moment is not None:
            self._last_moment.cancel()
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before_descriptor)
        os.close(self._reading)
        os.close(self._writing)

    @property
    def number(self) -> int:
        """Of the signal that came, 0 for none."""
        return self.cause.number if isinstance(self.cause, Stopped) else 0

    def note(self, cause: Exception) -> None:
        """From any thread: the run has to end. Only the first cause counts."""
        if self.cause is None:
            self.came, self.cause = time.monotonic(), cause

    def check(self) -> None:
        """Raises what has come."""
        if self.cause is not None:
            raise self.cause

    def wait(self, seconds: float) -> None:
        """Until something has come, or for so many seconds."""
        until = time.monotonic() + seconds
        while self.cause is None and time.monotonic() < until:
            time.sleep(0.05)

    def ending(self) -> None:
        """The run's own thread ends it."""
        self._is_ending.set()

    def _watch(self) -> None:
        while not self._over.is_set():
            if select.select([self._reading], [], [], TICK)[0]:
                for number in os.read(self._reading, 64):
                    self._receive(number)
            if self.cause is None and any(started(process) != since for process, since in self._launchers.items()):
                self.note(Stopped(signal.SIGTERM, "because its launcher is gone"))
            if self.cause is not None:
                self._hurry(self.cause)

    def _receive(self, number: int) -> None:
        if number not in ASKING or self._over.is_set():
            return
        if self.number and not self._launchers:
            os._exit(128 + number)
        self.note(Stopped(number))

    def _hurry(self, cause: Exception) -> None:
        """Ends the process where the run's own thread does not in time."""
        asked = isinstance(cause, Stopped)
        if asked and self._last_moment is None:
            self._last_moment = threading.Timer(self.came + self.grace - time.monotonic(), self._leave)
            self._last_moment.daemon = True
            self._last_moment.start()
        passed = time.monotonic() - self.came
        if not self._is_ending.is_set() and passed > (self.grace / 2 if asked else SHORT):
            self._end(cause)

    def _leave(self) -> None:
        print(
            f"stopped {self.cause}: saving was not done within checkpoint.grace = {self.grace:g} s",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.number)
