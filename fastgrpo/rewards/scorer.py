"""Scores beside what the run does, and within a time limit: a reward is code of others, and may never return.

waiting = [scorer.submit(reward, images, prompts, records) for ...]      in order, one at a time, in a thread
scores = scorer.scores(waiting)                                          RewardTimeout where one takes too long
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.rewards import RewardSum
from fastgrpo.rewards.calling import RewardTimeout, named

LOOK = 0.2  # seconds between two calls of `check`


@dataclass(frozen=True)
class Waiting:
    """Scores that are being made, and for what."""

    scores: "Future[Tensor]"
    reward: RewardSum
    prompts: list[str]


class Scorer:
    """timeout: seconds that the scores of a batch are waited for. check: called while they are; what it raises ends that."""

    def __init__(self, timeout: float, check: Callable[[], None] = lambda: None) -> None:
        self.timeout, self.check = timeout, check
        self.pool = DaemonPool(1, "reward")

    def submit(self, reward: RewardSum, images: Tensor, prompts: list[str], metadata: list[dict]) -> Waiting:
        """Begins to score a batch when those before it are done."""
        return Waiting(self.pool.submit(reward, images, prompts, metadata), reward, prompts)

    def scores(self, waiting: Sequence[Waiting]) -> Tensor:
        """The scores (N, R) of batches, in their order. Raises what a reward raised, or RewardTimeout."""
        return torch.cat([self._wait(one) for one in waiting])

    def close(self) -> None:
        """Drops what has not begun, and waits for nothing."""
        self.pool.close()

    def _wait(self, waiting: Waiting) -> Tensor:
        began = time.monotonic()
        while not waiting.scores.done():
            self.check()
            if time.monotonic() - began > self.timeout:
                raise RewardTimeout(
                    f"reward {' + '.join(map(repr, waiting.reward.names))} gave no scores for {len(waiting.prompts)} images "
                    f"within reward.timeout = {self.timeout:g} s ({named(waiting.prompts)})"
                )
            try:
                waiting.scores.exception(timeout=LOOK)
            except TimeoutError:
                continue
        return waiting.scores.result()
