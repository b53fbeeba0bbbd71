"""How much a service takes in, and how long it waits for it.

    room = Room(limits)
    with room.place() as place:         Full where as many requests as may wait are there already
        place.hold(size)                Full where their bytes would be too many

A request has its place from its first byte to its answer, and the place is as large as what it announced. So what waits is
bounded before it is there, and whoever comes too late can be told before anything of him is read.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastgrpo.config.bounds import Above, AtLeast, AtMost
from fastgrpo.config.keys import ImageCount
from fastgrpo.rewards.serving.wire import HEADER_BYTES, PREAMBLE

Size = Annotated[int, AtLeast(1), AtMost(1 << 40)]
Seconds = Annotated[float, Above(0), AtMost(3600)]
WholeSeconds = Annotated[int, AtLeast(1), AtMost(3600)]  # as uvicorn takes them
RETRY_AFTER = 1  # seconds after which a client that found no room should ask again


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one service. Raises ValueError where its largest request would find no room."""

    max_images: ImageCount = 64
    """Of a request, and of requests that are scored together."""
    max_bytes: Size = 1 << 28
    """Of a request's pixels, and of requests that are scored together, which are copied for it."""
    max_waiting: Size = 256
    """Requests that are read, wait or are scored at a time."""
    max_waiting_bytes: Size = 1 << 32
    """Bytes that these take together."""
    max_connections: Size = 512
    """At a time; one more is closed at once. Many systems allow a process 1024 open files."""
    head_seconds: Seconds = 10.0
    """For the head of a request, and for the first one of a connection to come."""
    body_seconds: Seconds = 60.0
    """For the body of a request."""
    idle_seconds: WholeSeconds = 30
    """A connection may be silent after an answer; longer than clients keep theirs, so that they close it and not we."""
    shutdown_seconds: WholeSeconds = 30
    """After SIGTERM, for the answers to what waits."""

    def __post_init__(self) -> None:
        largest = self.body_bytes + self.max_bytes
        if self.max_waiting_bytes < largest:
            raise ValueError(
                f"max_waiting_bytes = {self.max_waiting_bytes}: a request of max_bytes = {self.max_bytes} can take "
                f"{largest}, packed and unpacked; allow at least that, or smaller requests"
            )

    @property
    def body_bytes(self) -> int:
        """The largest body of a request."""
        return PREAMBLE.size + self.max_bytes + self.max_images * HEADER_BYTES


class Full(Exception):
    """There is no room for a request now."""


class Room:
    """The places of requests, and the bytes that they hold."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, threading.Lock()
        self.requests = self.bytes = 0

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """One more request, inside of this block."""
        place = Place(self)
        self.take(1, 0)
        try:
            yield place
        finally:
            self.take(-1, -place.bytes)

    def take(self, requests: int, size: int) -> None:
        """So many more, or fewer where negative. Raises Full, and then nothing is taken."""
        with self._lock:
            if requests > 0 and self.requests + requests > self._limits.max_waiting:
                raise Full(f"{self.requests} requests wait already: at most {self._limits.max_waiting}")
            if size > 0 and self.bytes + size > self._limits.max_waiting_bytes:
                raise Full(f"{self.bytes} bytes wait already: at most {self._limits.max_waiting_bytes}")
            self.requests, self.bytes = self.requests + requests, self.bytes + size


class Place:
    """What one request holds."""

    def __init__(self, room: Room) -> None:
        self._room, self.bytes = room, 0

    def hold(self, size: int) -> None:
        """Makes the place at least so large, from any thread. Raises Full."""
        if size > self.bytes:
            self._room.take(0, size - self.bytes)
            self.bytes = size
