"""Threads that nobody waits for."""

import subprocess
import sys
import threading
import time

import pytest

from fastgrpo.daemon_pool import DaemonPool


def test_calls_run_in_order_and_give_what_they_return_or_raise() -> None:
    pool, seen = DaemonPool(1, "test"), []
    futures = [pool.submit(seen.append, i) for i in range(5)]
    failed = pool.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failed.result(timeout=10)
    assert seen == list(range(5)) and all(future.done() for future in futures)
    exits = pool.submit(sys.exit, 3)
    with pytest.raises(SystemExit):
        exits.result(timeout=10)
    assert pool.submit(lambda: 7).result(timeout=10) == 7  # the thread lives


def test_as_many_at_a_time_as_there_are_threads() -> None:
    pool, both = DaemonPool(2, "test"), threading.Barrier(2)
    assert sorted(pool.map(lambda i: both.wait(10) * 0 + i, [1, 2])) == [1, 2]


def test_what_has_not_begun_is_dropped() -> None:
    pool, go = DaemonPool(1, "test"), threading.Event()
    first, second = pool.submit(go.wait, 10), pool.submit(lambda: 1)
    while not first.running():
        time.sleep(0.01)
    pool.close()
    go.set()
    assert first.result(timeout=10) and second.cancelled()


@pytest.mark.processes
def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    lines = "import time; from fastgrpo.daemon_pool import DaemonPool; DaemonPool(1, 'x').submit(time.sleep, 1000)"
    assert subprocess.run([sys.executable, "-c", lines], timeout=60).returncode == 0
