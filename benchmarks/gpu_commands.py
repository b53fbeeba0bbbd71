"""Phases of the GPU suite that are commands as a user gives them, judged by what they leave.

tests     the tests that run on a GPU
tiny      README's run, launcher and NCCL included, for 30 iterations; its first ones against those of a CPU
longer    the same to its end: does it learn what it learns on a CPU?
ncu       hardware counters of the transition's kernels
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_phase import REHEARSE, ROOT, Phase, main

CONFIG = "configs/tiny_shapes.yaml"
# Of the first lines of metrics.jsonl of `deepspeed fastgrpo/train.py --config configs/tiny_shapes.yaml` on a CPU.
REFERENCE = Path(__file__).with_name("reference_tiny.json")
TOLERANCE = 0.01  # of the first iteration's loss and gradient, relative
ACCURACY = 0.95  # what README says of the run
# In parallel, as every dtype, shape and alignment is a kernel to compile; with a line for each, as a run can be cut short.
TESTS = ["-m", "gpu", "-n", "10", "--timeout", "100", "--tb", "short"]
QUICK_TESTS = ["tests/kernels/test_philox.py"]
COUNTERS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "InstructionStats", "LaunchStats")
KERNELS = "regex:sde_step_fwd|transition_(fwd|bwd)"


def run(phase: Phase, command: list[str], output: Path) -> int:
    """The exit status of a command whose output goes to a file; 124 if it had to be ended, as of `timeout`."""
    with output.open("w", encoding="utf-8") as log:
        try:
            left = max(1, phase.left() - 3)
            return subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return 124


def tests(phase: Phase) -> None:
    log = phase.out / "tests.log"
    command = [sys.executable, "-m", "pytest", "-vv", "--no-header", "-p", "no:cacheprovider"]
    status = run(phase, [*command, *(QUICK_TESTS if REHEARSE else TESTS)], log)
    lines = log.read_text(encoding="utf-8").splitlines()
    counts = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    failed = [line[:160] for line in lines if re.search(r"\] (FAILED|ERROR) ", line)]
    phase.check("pytest", status == 0, status=status, counts=(counts or lines or ["no output"])[-1], failed=failed[:25])


def tiny(phase: Phase) -> None:
    settings = ["iterations=30", "evaluation.every=0", "evaluation.images=200"]
    rehearsed = ["iterations=2", "evaluation.images=20", "evaluation.num_steps=4", "evaluation.samples=4"]
    rows, _ = deepspeed(phase, [*settings, *(rehearsed if REHEARSE else [])])
    for mine, reference in zip(rows, json.loads(REFERENCE.read_text(encoding="utf-8")), strict=False):
        against_cpu(phase, mine, reference)


def longer(phase: Phase) -> None:
    rehearsed = ["iterations=1", "evaluation.images=20", "evaluation.num_steps=4", "evaluation.samples=4"]
    _, summary = deepspeed(phase, rehearsed if REHEARSE else [])
    final = summary.get("final_accuracy", 0.0)
    phase.check("final accuracy", REHEARSE or final >= ACCURACY, accuracy=final, on_a_cpu=ACCURACY)


def deepspeed(phase: Phase, settings: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The tiny run by README's own command: its metrics and its summary."""
    log, folder = phase.out / f"{phase.name}.log", Path(tempfile.mkdtemp()) / "run"
    options = [part for setting in (*settings, f"output={folder}") for part in ("--set", setting)]
    began = time.monotonic()
    status = run(phase, ["deepspeed", "fastgrpo/train.py", "--config", CONFIG, *options], log)
    seconds = round(time.monotonic() - began, 1)
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    found = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    shown = {key: found.get(key) for key in ("rollout", "base_accuracy", "final_accuracy", "train_seconds")}
    phase.check(
        "deepspeed", status == 0 and bool(rows), status=status, seconds=seconds, iterations=len(rows), **shown,
        tail=log.read_text(encoding="utf-8")[-600:] if status else "",
    )  # fmt: skip
    if rows:
        phase.record("last iteration", **{part: round(seconds, 3) for part, seconds in rows[-1]["seconds"].items()})
    return rows, found


def against_cpu(phase: Phase, mine: dict[str, Any], reference: dict[str, Any]) -> None:
    """Noise is addressed, so that the first iteration is the same on every device; later ones drift apart by rounding."""
    off = {key: abs(mine[key] / reference[key] - 1) for key in ("loss", "grad_norm")}
    right = mine["reward"] == reference["reward"] and max(off.values()) < TOLERANCE
    phase.check(
        f"iteration {mine['iteration']} against a CPU", right or mine["iteration"] > 1,
        reward=mine["reward"], reward_on_a_cpu=reference["reward"], reward_equal=mine["reward"] == reference["reward"],
        **{f"{key}_relative": float(f"{value:.2e}") for key, value in off.items()},
        first_ratio_deviation=mine["first_ratio_deviation"],
    )  # fmt: skip


def ncu(phase: Phase) -> None:
    """Is the transition bound by bytes or by instructions, and how full are the multiprocessors?"""
    if REHEARSE:
        phase.record("ncu", skipped="there is no GPU")
        return
    sections = [f"--section={name}" for name in COUNTERS]
    target = [sys.executable, "-c", "import gpu_kernels; gpu_kernels.launch_for_counters()"]
    options = ["--clock-control", "none", "--csv", "--page", "raw", "-k", KERNELS, "-c", "9"]
    counters, printed = phase.out / "ncu.csv", Path(tempfile.mkdtemp()) / "log"
    status = run(phase, ["ncu", "--log-file", str(counters), *options, *sections, *target], printed)
    lines = counters.read_text(encoding="utf-8").splitlines() if counters.exists() else []
    said = [*lines[-2:], *printed.read_text(encoding="utf-8").splitlines()[-3:]] if status else []
    phase.check("ncu", status == 0, status=status, lines=len(lines), said=said)


if __name__ == "__main__":
    main({"tests": tests, "tiny": tiny, "longer": longer, "ncu": ncu})
