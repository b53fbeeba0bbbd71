"""Trying again, after pauses that grow and differ.

for _ in (tries := Tries(retries=8, pause=0.5, seconds=900)):
    ... return, or tries.after = seconds that a server asked for
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

LONGEST_PAUSE = 30.0  # seconds
_RANDOM = random.Random()  # a generator of its own: a retry must not change what a run draws


@dataclass
class Tries:
    """Counts a first try and `retries` more, and sleeps before each of these: `pause` seconds, then twice as long each time.

    A pause is at most `LONGEST_PAUSE`, give or take half of it: without that, all that failed together would come back
    together. It is as long as `after` says, up to `LONGEST_PAUSE` too, where that is longer.
    """

    retries: int
    pause: float
    seconds: float = math.inf  # for all of it; no try begins later
    after: float = 0.0

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds until all of it must have ended."""
        return self._end - time.monotonic()

    def __iter__(self) -> Iterator[int]:
        pause = self.pause
        for number in range(self.retries + 1):
            if number:
                grown = min(pause, LONGEST_PAUSE) * _RANDOM.uniform(0.5, 1.5)
                asked = min(self.after, LONGEST_PAUSE) * _RANDOM.uniform(1, 1.5)
                wait = max(grown, asked)
                if wait >= self.left():
                    return
                time.sleep(wait)
                pause = min(2 * pause, LONGEST_PAUSE)
            yield number
