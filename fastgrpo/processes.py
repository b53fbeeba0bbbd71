"""Other processes of this machine: whether one still runs, and whether the launcher of this one does."""

import os
from pathlib import Path


def started(process: int) -> str | None:
    """When a process of this machine began, in ticks since its start; None if there is none of that number.

    Numbers are given anew: only with its start does a number name a process.
    """
    fields = _stat(process)
    if fields is not None:
        return fields[19]
    try:  # a system without /proc
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def launchers() -> dict[int, str | None]:
    """The processes that launched this one and without which it is an orphan, with their starts; none if there are none.

    A launcher that is killed cannot end its ranks, which would train on unseen. torchrun is the parent of its ranks. That of
    DeepSpeed's is `deepspeed.launcher.launch`, whose own parent is the command `deepspeed`.
    """
    generations = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 2 if "CROSS_RANK" in os.environ else 0
    found, process = {}, os.getpid()
    for _ in range(generations):
        parent = _parent(process)
        if parent is None or parent <= 1:
            break
        found[parent], process = started(parent), parent
    return found


def _parent(process: int) -> int | None:
    fields = _stat(process)
    return None if fields is None else int(fields[1])


def _stat(process: int) -> list[str] | None:
    """What the kernel says of a process, from its state on; None without such a process or without /proc."""
    try:
        # After the name, which may hold anything, in brackets: https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
