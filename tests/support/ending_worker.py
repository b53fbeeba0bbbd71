"""A training run to which something happens in its third iteration, for `support.runs.ForkServer`.

    support.ending_worker:main  KIND  the arguments of `fastgrpo train`

With two ranks it happens to the second one alone.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from fastgrpo.commands import train
from fastgrpo.trainer import Trainer


def hang(trainer: Any) -> None:
    """Where no signal reaches Python."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def hang_and_be_asked_to_end(trainer: Any) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -TERM {os.getpid()}"])
    hang(trainer)


def stop(trainer: Any) -> None:
    """As a process of a machine that is gone. In the end it is killed, as the tests wait for it."""
    subprocess.Popen(["sh", "-c", f"sleep 20; kill -9 {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def out_of_memory(trainer: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")


def in_the_update(trainer: Any) -> None:
    """After the first of two optimiser steps."""
    step = trainer.engine.step

    def failing() -> Any:
        trainer.engine.step = lambda: 1 / 0
        return step()

    trainer.engine.step = failing


def no_room(trainer: Any) -> None:
    """For files of more than 20 kB, as on a disk that is full; what was begun before is done."""
    trainer.saving.saver.wait(None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


EVENTS: dict[str, Callable[[Any], Any]] = {
    "hang": hang_and_be_asked_to_end,
    "stop": stop,
    "kill": lambda trainer: os.kill(os.getpid(), signal.SIGKILL),
    "out of memory": out_of_memory,
    "in the update": in_the_update,
    "exit": lambda trainer: sys.exit(0),
    "code": lambda trainer: {}["nothing"],
    "no room": no_room,
    "no room for an iteration": no_room,
}


def main(arguments: list[str]) -> int:
    kind, *options = arguments
    iterate = Trainer.iterate

    def disturbed(self: Trainer, iteration: int) -> dict:
        if iteration == 3 and self.ranks.rank == self.ranks.world_size - 1:
            EVENTS[kind](self)
        if iteration == 5 and kind == "no room for an iteration":
            self.saving.saver.wait(None)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return iterate(self, iteration)

    Trainer.iterate = disturbed
    return train.main(options)
