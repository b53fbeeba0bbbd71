"""Runs that are killed and go on, beside one that nothing disturbed: every file has to be the same in the end.

    python benchmarks/kills.py                      50 kills with one process, 50 with two; writes results/kills_DEVICE.json
    python benchmarks/kills.py --kills 10 --seed 3

A kill is SIGKILL before a random operation on files, which an audit hook counts, or after a random time of the processor.
With two ranks it comes to one of them, and to the other at the same moment, or the other is left to end by itself, and
after ten seconds asked to, as a launcher asks. Then the same command goes on, and is often killed as well, until it ends.
The folder must be that of the undisturbed run, file by file and bit by bit but for what the clock says, its report up to
date, and `fastgrpo verify` without a fault. Curves for TensorBoard are not compared. The exit status is 1 where a run
differs.

A run is a fork of this process, which has imported what takes seconds to import.
"""

import argparse
import importlib
import itertools
import math
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import ROOT, finish, keep
from run_differences import differences
from tqdm import tqdm

from fastgrpo.commands.cli import main as command
from fastgrpo.engine.ranks import load_deepspeed

SLOW_TO_IMPORT = ("fastgrpo.trainer", "fastgrpo.models.sd3", "deepspeed.runtime.zero.muon.original_muon")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime", "shutil.rmtree")
AGAIN = 0.4  # how often a run that goes on is killed as well
PATIENCE = 10  # seconds that a rank is left to end by itself when another was killed
TIMEOUT = 300  # seconds of one process
SETTINGS = [
    "iterations=6", "checkpoint.every=2", "checkpoint.keep_best=true", "evaluation.every=3", "evaluation.images=5",
    "evaluation.images_between=5", "evaluation.batch_size=5", "evaluation.samples=2", "evaluation.num_steps=2",
    "evaluation.guidance_scale=1", "rollout.groups=1", "rollout.group_size=4", "rollout.batch_size=2",
    "rollout.num_steps=2", "rollout.guidance_scale=1", "rollout.window={kind: random, size: 1}",
    "model.lora={rank: 4, alpha: 8}", "update.steps_per_rollout=1", "reward.train=jpeg_compressibility",
    "reward.eval=jpeg_compressibility", "engine.lost_after=5", "seed=3",  # by which the best evaluation is not the last
]  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """rank: whom it comes to; alone: whether the others are left to end by themselves."""

    how: str  # "operation" or "moment"
    at: float  # the number of an operation on files, from 1, or seconds of the processor
    rank: int = 0
    alone: bool = False
    on: str = ""  # a part of the files' paths: others are not counted


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended, by rank."""

    statuses: list[int]  # -9 for one that was killed
    operations: list[int]  # on files, so many
    seconds: list[float]  # of the processor
    printed: str

    @property
    def was_killed(self) -> bool:
        return -signal.SIGKILL in self.statuses


@dataclass
class Trial:
    """A run that was killed, perhaps several times, and the differences in its folder when it had ended."""

    ranks: int
    kills: list[Kill] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def import_slow() -> None:
    load_deepspeed()
    for module in SLOW_TO_IMPORT:
        importlib.import_module(module)


def train(folder: Path, ranks: int, kill: Kill | None = None, settings: Sequence[str] = ()) -> Ended:
    """`fastgrpo train` into a folder, in forks of this process, with a kill that may come too late."""
    settings = [part for one in (*SETTINGS, *settings, f"output={folder}") for part in ("--set", one)]
    arguments = ["train", "--config", str(ROOT / "configs" / "tiny_shapes_grpo.yaml"), *settings]
    counts = np.frombuffer(mmap.mmap(-1, 8 * ranks), dtype=np.int64)  # shared with the forks
    with socket.socket() as probe, tempfile.TemporaryFile() as output:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        running = {}
        for rank in range(ranks):
            process = os.fork()
            if process == 0:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                own = kill if kill and kill.how == "operation" and kill.rank == rank else Kill("operation", at=0)
                _child(arguments, output.fileno(), counts[rank : rank + 1], own)
            running[rank] = process
        statuses, seconds = _wait(running, kill)
        output.seek(0)
        return Ended(statuses, counts.tolist(), seconds, output.read().decode(errors="replace"))


def _child(arguments: list[str], output: int, count: np.ndarray, kill: Kill) -> None:
    """Runs the command in a fork, which ends here; before the operation of `kill` it is killed."""
    numbers = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (event in CHANGES or writes) and kill.on in str(arguments[0]):
            count[0] = next(numbers)
            if count[0] == kill.at:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    try:
        for stream in (1, 2):
            os.dup2(output, stream)
        signal.alarm(TIMEOUT)  # whose signal ends a process
        sys.addaudithook(hook)
        status = command(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # what this process would do at its end is for it alone


def _wait(running: dict[int, int], kill: Kill | None) -> tuple[list[int], list[float]]:
    """For the processes by rank; their statuses and seconds of the processor."""
    waiting, statuses, seconds = dict(running), [0] * len(running), [0.0] * len(running)
    victim, until = psutil.Process(running[kill.rank]) if kill else None, math.inf
    while waiting:
        for rank, process in list(waiting.items()):
            ended, status, used = os.wait4(process, os.WNOHANG)
            if ended:
                del waiting[rank]
                statuses[rank], seconds[rank] = os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
                if kill and rank == kill.rank and statuses[rank] == -signal.SIGKILL:
                    until = time.monotonic() + (PATIENCE if kill.alone else 0)
        if kill and time.monotonic() >= until:  # a rank that waits for another before the run begins waits for long
            for other in waiting.values():
                os.kill(other, signal.SIGTERM if kill.alone else signal.SIGKILL)
            until = math.inf
        if kill and victim and kill.how == "moment" and kill.rank in waiting:
            times = victim.cpu_times()
            if times.user + times.system >= kill.at:
                os.kill(victim.pid, signal.SIGKILL)
        time.sleep(0.002)
    return statuses, seconds


def trial(folder: Path, undisturbed: Path, whole: Ended, ranks: int, draw: random.Random) -> Trial:
    """One run, which is killed at least once, from its beginning to its end.

    whole: the undisturbed run, whose operations and seconds say when a kill can come.
    """
    done, ended = Trial(ranks), None
    while ended is None or ended.was_killed:
        kill = None
        if ended is None or draw.random() < AGAIN:
            how, rank, alone = draw.choice(["operation", "moment"]), draw.randrange(ranks), draw.random() < 0.5
            last = whole.operations[rank] if how == "operation" else whole.seconds[rank]
            kill = Kill(how, draw.randint(1, last) if how == "operation" else draw.uniform(0, last), rank, alone)
        ended = train(folder, ranks, kill)
        if kill and ended.was_killed:
            done.kills.append(kill)
    if any(ended.statuses):
        done.differences = [f"ended with {ended.statuses}: {ended.printed.strip().splitlines()[-1:]}"]
    else:
        done.differences = differences(folder, undisturbed)
    return done


def trials(root: Path, ranks: int, kills: int, seed: int) -> Iterator[Trial]:
    """Until so many kills came."""
    draw, undisturbed = random.Random(f"{seed} {ranks}"), root / f"undisturbed_{ranks}"
    whole = train(undisturbed, ranks)
    if any(whole.statuses):
        raise RuntimeError(f"the undisturbed run of {ranks} ranks failed: {whole.printed}")
    number = 0
    while kills > 0:
        number += 1
        folder = root / f"killed_{ranks}_{number}"
        one = trial(folder, undisturbed, whole, ranks, draw)
        if one.kills:
            kills -= len(one.kills)
            yield one
        if not one.differences:
            shutil.rmtree(folder)


def table(done: list[Trial]) -> str:
    """A line for each way to be killed, and the differences."""
    counts: dict[str, list[int]] = {}
    for one in done:
        ways = [f"{one.ranks} ranks, {kill.how}{', one alone' * (kill.alone and one.ranks > 1)}" for kill in one.kills]
        for way in ways:
            counts.setdefault(way, [0, 0, 0])[0] += 1
        for way in set(ways):
            counts[way][1] += 1
            counts[way][2] += bool(one.differences)
    lines = [f"{'':30} kills   runs  differ"]
    lines += [f"{way:30} {kills:5} {runs:6} {differ:7}" for way, (kills, runs, differ) in sorted(counts.items())]
    return "\n".join(lines + [f"{one.ranks} ranks, {one.kills}: {line}" for one in done for line in one.differences])


def result(seed: int, done: list[Trial]) -> dict[str, Any]:
    kills, differ = sum(len(one.kills) for one in done), sum(bool(one.differences) for one in done)
    return {"seed": seed, "kills": kills, "runs": len(done), "differ": differ, "trials": [asdict(one) for one in done]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where the folders of runs that differ are left, to look at")
    arguments = parser.parse_args(argv)
    import_slow()
    done: list[Trial] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        with tqdm(total=arguments.kills * len(arguments.ranks), desc="kills") as bar:
            for ranks in arguments.ranks:
                for one in trials(root, ranks, arguments.kills, arguments.seed):
                    done.append(one)
                    keep("kills", result(arguments.seed, done))
                    bar.update(len(one.kills))
    print(table(done))
    finish("kills", result(arguments.seed, done))
    return int(any(one.differences for one in done))


if __name__ == "__main__":
    sys.exit(main())
