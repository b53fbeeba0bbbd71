"""Requests that wait are scored together: one batch after the other, in a thread, while the loop takes in more."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from fastgrpo.daemon_pool import DaemonPool
from fastgrpo.rewards.serving.counting import Counts
from fastgrpo.rewards.serving.limits import Limits
from fastgrpo.rewards.serving.wire import Request


@dataclass(eq=False)
class Waiting:
    """A request, and the future of its scores."""

    request: Request
    answer: asyncio.Future[list[float]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Scores requests of one shape of image together, up to `max_images` and `max_bytes`.

    When a batch fails, each of its requests is scored again by itself, so that a bad one fails for its sender alone.
    """

    def __init__(self, score: Callable[[Request], list[float]], limits: Limits, counts: Counts) -> None:
        self._score, self._limits, self._counts = score, limits, counts
        self._waiting: deque[Waiting] = deque()
        self._arrived, self._thread = asyncio.Event(), DaemonPool(1, "reward")

    async def __call__(self, request: Request) -> list[float]:
        """The scores of one request, which is forgotten when the caller no longer waits."""
        one = Waiting(request)
        self._waiting.append(one)
        self._arrived.set()
        try:
            return await one.answer
        finally:
            with suppress(ValueError):  # where it was taken into a batch
                self._waiting.remove(one)

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._arrived.wait()
            if self._waiting:
                await self._answer(self._take())
            else:
                self._arrived.clear()

    def _take(self) -> list[Waiting]:
        """From the front, what fits into a batch and has the first one's shape of image."""
        batch = [self._waiting.popleft()]
        first = batch[0].request.images
        most = min(self._limits.max_images, self._limits.max_bytes // first[0].nbytes)
        images = len(first)
        while self._waiting:
            following = self._waiting[0].request.images
            images += len(following)
            if images > most or following.shape[1:] != first.shape[1:]:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _answer(self, batch: list[Waiting]) -> None:
        batch = [one for one in batch if not one.answer.done()]  # its client may have left
        if not batch:
            return
        requests, began = [one.request for one in batch], time.perf_counter()
        try:
            scores = await asyncio.wrap_future(self._thread.submit(lambda: self._score(join(requests))))
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    await self._answer([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        self._counts["batches"] += 1
        self._counts["images"] += len(scores)
        self._counts["seconds"] += time.perf_counter() - began
        for one in batch:
            if not one.answer.done():
                one.answer.set_result(scores[: len(one.request.prompts)])
            scores = scores[len(one.request.prompts) :]


def join(requests: list[Request]) -> Request:
    """Several requests as one."""
    if len(requests) == 1:
        return requests[0]
    return Request(
        torch.cat([request.images for request in requests]),
        [prompt for request in requests for prompt in request.prompts],
        [record for request in requests for record in request.metadata],
    )
