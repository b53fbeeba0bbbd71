"""Runs under the real launchers, which are asked to end or are killed: no process is left, and the state is saved.

Neither is a process of the tests' own group: what the launcher starts is found by the run's folder in its command line.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.helpers import ROOT, environment
from support.runs import command, options, rows, rows_so_far

pytestmark = [pytest.mark.processes, pytest.mark.slow]

RARE = [
    "checkpoint.every=1000", "evaluation.every=0", "evaluation.images=6", "evaluation.samples=0", "iterations=1000",
    "reward.eval=jpeg_compressibility",
]  # fmt: skip
GONE = 40  # seconds in which all have ended


def deepspeed(folder: Path, *settings: str) -> list[str]:
    """Two ranks, without GPUs."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29671"]
    return [*launcher, str(ROOT / "fastgrpo" / "train.py"), *options(folder, *settings)]


LAUNCHERS: dict[str, Callable[..., list[str]]] = {
    "torchrun": lambda folder, *settings: command(folder, *settings, ranks=2),
    "deepspeed": deepspeed,
}


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if f"output={folder}" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended just now
            continue
    return found


@pytest.mark.parametrize(("launcher", "number"), [("torchrun", signal.SIGTERM), ("deepspeed", signal.SIGKILL)])
def test_whatever_ends_the_launcher_the_ranks_save_and_end(launcher: str, number: signal.Signals, tmp_path: Path) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}:{environment()['PATH']}"}  # deepspeed starts `python` by name
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(
            LAUNCHERS[launcher](tmp_path / "run", *RARE), cwd=ROOT, env=environment(ROOT / "tests", **path), stdout=printed,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists() or len(rows_so_far(tmp_path / "run")) < 2:
            assert process.poll() is None, (tmp_path / "printed").read_text()
            time.sleep(0.1)
        assert len(processes_of(tmp_path / "run")) > 2
        process.send_signal(number)
        deadline = time.monotonic() + GONE
        while processes_of(tmp_path / "run") and time.monotonic() < deadline:
            process.poll()
            time.sleep(0.2)
        assert processes_of(tmp_path / "run") == []
    finally:
        for left in processes_of(tmp_path / "run"):
            left.kill()
        process.kill()
        process.wait()
    done = len(rows(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"{done:05d}"]
    assert f"the state after iteration {done} is saved" in (tmp_path / "printed").read_text()
