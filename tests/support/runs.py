"""Whole runs as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from support.helpers import ROOT, environment

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
SMALL = [
    "iterations=4", "rollout.groups=4", "rollout.group_size=4", "rollout.batch_size=4", "rollout.num_steps=4",
    "rollout.window={kind: random, size: 2}", "model.lora={rank: 4, alpha: 8}", "evaluation.images=10",
    "evaluation.images_between=10", "evaluation.batch_size=6", "evaluation.num_steps=4", "evaluation.samples=6",
    "evaluation.every=2", "checkpoint.every=2", "reward.train=tiny_shapes_graded", "rollout.guidance_scale=1.0",
    "evaluation.guidance_scale=1.0", "update.steps_per_rollout=2", "objective.beta=0.1",
]  # fmt: skip
CONSOLE_SCRIPT = "fastgrpo.commands.cli:main"


def options(output: Path, *settings: str) -> list[str]:
    """Of a small run into a folder."""
    return ["--config", str(CONFIG), *(part for one in (*SMALL, *settings, f"output={output}") for part in ("--set", one))]


def command(output: Path, *settings: str, ranks: int = 0) -> list[str]:
    """One process through the console script's module, or several through torch's launcher."""
    if not ranks:
        return [sys.executable, "-m", "fastgrpo", "train", *options(output, *settings)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "fastgrpo" / "train.py"), *options(output, *settings)]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(ROOT / "tests"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(arguments: list[str], status: int = 0) -> str:
    process = start(arguments)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


class ForkServer:
    """Runs programs without the seconds that a process takes to import: see `support/fork_server.py`."""

    def __enter__(self) -> "ForkServer":
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            cwd=ROOT, env=environment(ROOT / "tests"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.communicate()  # closes its input, which ends it

    def run(self, *arguments: str, program: str = CONSOLE_SCRIPT, ranks: int = 0, status: int = 0) -> str:
        """What it printed."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps({"program": program, "arguments": arguments, "ranks": ranks}), file=self._process.stdin, flush=True)
        ended = json.loads(self._process.stdout.readline())
        assert ended["status"] == status, ended["output"]
        return ended["output"]

    def train(self, output: Path, *settings: str, ranks: int = 0, status: int = 0) -> str:
        return self.run("train", *options(output, *settings), ranks=ranks, status=status)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's file without what the clock says."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def rows_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()
