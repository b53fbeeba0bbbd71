"""Threads that a process never waits for when it ends: what calls code of others can hang for ever.

    pool = DaemonPool(2, "reward")
    score = pool.submit(reward, images)      a concurrent.futures.Future
    score.result(timeout=60)

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter ends: one call that hangs keeps the process.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Call = tuple[Future, Callable[..., Any], tuple[Any, ...]]


class DaemonPool:
    """Runs calls in the order in which they come, `threads` at a time. The threads begin with the first call."""

    def __init__(self, threads: int, name: str) -> None:
        self._count, self._name = threads, name
        self._threads: list[threading.Thread] = []
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Queues one call; its result, or what it raised, is the future's."""
        future: Future[Result] = Future()
        self._calls.put((future, function, arguments))
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._work, name=f"{self._name} {len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items; the first error is raised in its place, and what waits is dropped."""
        futures = [self.submit(function, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Drops what has not begun. What runs goes on, and nobody waits for it."""
        while True:
            try:
                future, *_ = self._calls.get_nowait()
            except queue.Empty:
                return
            future.cancel()

    def _work(self) -> None:
        while True:
            future, function, arguments = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # it is the caller's, also where it is SystemExit
                future.set_exception(error)
            del future, function, arguments  # an idle thread must keep no images
