"""Trying again, after pauses that grow and differ."""

import random
import time
from collections.abc import Iterator

LONGEST_PAUSE = 30.0  # seconds
_RANDOM = random.Random()  # a generator of its own: a retry must not change what a run draws


def tries(retries: int, pause: float) -> Iterator[int]:
    """Counts a first try and `retries` more. Before each of these it sleeps: `pause` seconds, then twice as long each time.

    A pause is at most `LONGEST_PAUSE`, give or take half of it: without that, all that failed together would come back
    together.
    """
    for number in range(retries + 1):
        if number:
            time.sleep(min(pause, LONGEST_PAUSE) * _RANDOM.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)
        yield number
