"""One of two ranks at a `fastgrpo.engine.board.Board`; rank 0 holds the store. Prints a line of JSON of what it heard.

support.board_worker:main  KIND        for `support.runs.ForkServer` with ranks=2
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import torch.distributed as dist

from fastgrpo.engine import board
from fastgrpo.engine.board import Board
from fastgrpo.engine.ranks import OneRank
from fastgrpo.stopping import EndedElsewhere

LOST_AFTER = 2.0
LONG = 30.0  # seconds that nothing here takes


def stop_for(seconds: float) -> None:
    """As a machine that does not answer."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


# What the rank of that number does.
ACTIONS: dict[str, tuple[int, Callable[[Board], object]]] = {
    "post": (1, lambda it: (it.post("error: reward 'x' failed (on rank 1)", 70), it.leave())),
    "post twice": (1, lambda it: (it.post("first", 70), it.post("second", 71), it.leave())),
    "silence": (1, lambda it: stop_for(4 * LOST_AFTER)),
    "leave": (1, lambda it: it.leave()),
    "store gone": (0, lambda it: os.kill(os.getpid(), signal.SIGKILL)),
    "store silent": (0, lambda it: stop_for(4 * LOST_AFTER)),
}


def main(arguments: list[str]) -> int:
    kind, rank = arguments[0], int(os.environ["RANK"])
    board.BEAT = 0.2
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, is_master=rank == 0)
    heard: list[Exception] = []
    acting, act = ACTIONS[kind]
    with Board(OneRank(rank=rank, world_size=2), LOST_AFTER, heard.append) as own:
        store.set(f"here/{rank}", "")
        store.wait([f"here/{1 - rank}"])
        time.sleep(3 * board.BEAT)  # both have been heard
        if rank == acting:
            act(own)
        nothing = kind == "leave" or rank == acting and kind.startswith("post")
        until = time.monotonic() + (2 * LOST_AFTER if nothing else LONG)
        while not heard and time.monotonic() < until:
            time.sleep(0.05)
        said = [[type(one).__name__, str(one), one.status if isinstance(one, EndedElsewhere) else None] for one in heard]
        if not kind.startswith("store"):  # which would be gone with rank 0
            store.set("done", "") if rank else store.wait(["done"])
        began = time.monotonic()
        own.post("a last word", 1)
        seconds = time.monotonic() - began
    print(json.dumps({"rank": rank, "heard": said, "hangs": seconds > LONG / 2}), flush=True)
    os._exit(0)  # a connection to a store that is gone would be closed at leisure
