"""Whole runs as a user starts them."""

import json
import subprocess
import sys
from pathlib import Path

from support.helpers import ROOT, environment

CONFIG = ROOT / "configs" / "tiny_shapes_grpo.yaml"
SMALL = [
    "iterations=4", "rollout.groups=4", "rollout.group_size=4", "rollout.batch_size=4", "rollout.num_steps=4",
    "rollout.window={kind: random, size: 2}", "model.lora={rank: 4, alpha: 8}", "evaluation.images=10",
    "evaluation.images_between=10", "evaluation.batch_size=6", "evaluation.num_steps=4", "evaluation.samples=6",
    "evaluation.every=2", "checkpoint.every=2", "reward.train=tiny_shapes_graded", "rollout.guidance_scale=1.0",
    "evaluation.guidance_scale=1.0", "update.steps_per_rollout=2", "objective.beta=0.1",
]  # fmt: skip


def command(output: Path, *settings: str, ranks: int = 0) -> list[str]:
    """One process through the console script's module, or several through torch's launcher."""
    options = [part for setting in (*SMALL, *settings, f"output={output}") for part in ("--set", setting)]
    if not ranks:
        return [sys.executable, "-m", "fastgrpo", "train", "--config", str(CONFIG), *options]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "fastgrpo" / "train.py"), "--config", str(CONFIG), *options]


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(ROOT / "tests"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(arguments: list[str], status: int = 0) -> str:
    process = start(arguments)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output
    return output


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's file without what the clock says."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def rows_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()
