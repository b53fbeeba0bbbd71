"""What asks a run to end is only noted; where the run does not end by itself another thread ends it; and all in time."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from fastgrpo.stopping import ASKING, SHORT, EndedElsewhere, LostRank, Stopped, Watch


@pytest.fixture
def heeded() -> Iterator[None]:
    """Signals have their usual effect, also where the tests run in the background of a shell, which ignores Ctrl-C."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def never(cause: Exception) -> None:
    raise AssertionError(f"ended by {cause}")


def wait_for(watch: Watch) -> None:
    watch.wait(20)
    assert watch.cause is not None


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_noted_until_it_is_asked_for(number: signal.Signals, heeded: None) -> None:
    before = signal.getsignal(number)
    with Watch(100, never) as watch:
        watch.check()
        os.kill(os.getpid(), number)
        wait_for(watch)
        with pytest.raises(Stopped, match=f"^by {number.name}$") as stopped:
            watch.check()
        assert watch.number == number
    assert stopped.value.number == number and signal.getsignal(number) == before
    with watch:  # a second run of the same
        watch.check()


def test_only_the_first_cause_counts(heeded: None) -> None:
    with Watch(100, never) as watch:
        watch.ending()
        watch.note(LostRank("rank 3 is gone"))
        watch.note(Stopped(signal.SIGTERM))
        with pytest.raises(LostRank, match="rank 3 is gone"):
            watch.check()
        assert watch.number == 0


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Watch(100, never) as watch:
            os.kill(os.getpid(), signal.SIGINT)
            watch.wait(0.3)
            watch.check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_leaves_the_handlers_alone() -> None:
    failed, before = [], signal.getsignal(signal.SIGTERM)

    def use() -> None:
        try:
            with Watch(100, never):
                assert signal.getsignal(signal.SIGTERM) == before
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert not failed


def status_of(act: Callable[[], None]) -> tuple[int, float]:
    """How a fork ends that runs `act`, and the seconds it takes."""
    began, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            act()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began


def leave(cause: Exception) -> NoReturn:
    os._exit({Stopped: 50, EndedElsewhere: 51, LostRank: 52}[type(cause)])


def hang() -> None:
    """In C, where Python sees no signal: a lock that is never free."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def test_a_second_signal_ends_the_process() -> None:
    def act() -> None:
        with Watch(100, never) as watch:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(watch)
            os.kill(os.getpid(), signal.SIGTERM)
            hang()

    assert status_of(act)[0] == 128 + signal.SIGTERM


def test_under_a_launcher_which_repeats_them_a_second_signal_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # the parent is this process, which lives

    def act() -> None:
        with Watch(2, leave) as watch:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                wait_for(watch)
            hang()

    assert status_of(act)[0] == 50


def test_what_hangs_is_ended_after_half_of_the_grace() -> None:
    def act() -> None:
        with Watch(3, leave):
            os.kill(os.getpid(), signal.SIGTERM)
            hang()

    status, seconds = status_of(act)
    assert status == 50 and seconds > 1.4


@pytest.mark.parametrize(("cause", "status"), [(EndedElsewhere("a", 70), 51), (LostRank("b"), 52)])
def test_without_the_other_ranks_nothing_is_waited_for(cause: Exception, status: int) -> None:
    def act() -> None:
        with Watch(1000, leave) as watch:
            watch.note(cause)
            hang()

    ended, seconds = status_of(act)
    assert ended == status and seconds > SHORT


def test_saving_that_never_ends_is_ended_when_the_grace_is_over() -> None:
    def act() -> None:
        with Watch(2, never) as watch:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(watch)
            watch.ending()
            hang()

    status, seconds = status_of(act)
    assert status == 128 + signal.SIGTERM and seconds > 1.9


ORPHAN = """
import os, signal, sys, time
from fastgrpo.stopping import Stopped, Watch
with Watch(100, lambda cause: os._exit(9)) as watch:
    print("ready", flush=True)
    watch.wait(10)
    try:
        watch.check()
    except Stopped as stopped:
        print(stopped, stopped.number, flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("variable", "generations"), [("TORCHELASTIC_RUN_ID", 1), ("CROSS_RANK", 1), ("CROSS_RANK", 2), ("X", 1)]
)
def test_an_orphan_of_a_launcher_stops_and_of_a_shell_goes_on(variable: str, generations: int) -> None:
    """As torchrun's ranks are its children, and DeepSpeed's the grandchildren of the command."""
    rank = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ORPHAN!r}])"
    if generations == 2:
        rank = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = {**os.environ, variable: "1"}
    launcher = subprocess.Popen([sys.executable, "-c", rank], env=environment, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
    launcher.kill()
    if variable == "X":
        launcher.wait()
        assert not select.select([launcher.stdout], [], [], 2)[0]  # it waits still, and ends with its minute
    else:
        assert launcher.stdout.readline() == f"because its launcher is gone {int(signal.SIGTERM)}\n"
