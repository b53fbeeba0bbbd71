"""A long run of the tiny model, and what it takes of the machine from beginning to end.

    python benchmarks/soak.py                     2,000 iterations; writes results/soak_DEVICE.{json,png}

After every iteration: memory, open descriptors, threads, seconds (of the clock and of the processor) and the size of the
run's folder, with checkpoints, evaluations and reports as they come. Of 20 iterations, from one checkpoint to the next,
the mean of the seconds counts, and the highest of the others. A line is fitted through what follows the first quarter:
all but the folder have to be flat along it, which is not to rise, and the folder has to grow along a line. The exit status
is 1 where one does not. On a machine that is shared the seconds of the clock say what its other users do.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import ROOT, finish, pyplot

from fastgrpo.callbacks import Callback, Run
from fastgrpo.engine.ranks import finish as leave
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

BLOCK = 20  # iterations from one checkpoint to the next
WARM = 0.25  # of a run, before which nothing is fitted
SETTINGS = [
    f"checkpoint.every={BLOCK}", "evaluation.every=100", "evaluation.images=5", "evaluation.images_between=5",
    "evaluation.batch_size=5", "evaluation.samples=2", "evaluation.num_steps=2", "evaluation.guidance_scale=1",
    "rollout.groups=2", "rollout.group_size=2", "rollout.batch_size=4", "rollout.num_steps=3", "rollout.guidance_scale=1",
    "rollout.window={kind: random, size: 1}", "model.lora={rank: 2, alpha: 4, targets: [attn.to_q, attn.to_v]}",
    "reward.train=tiny_shapes_graded", "update.learning_rate=1e-5", "update.steps_per_rollout=1",
]  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """What is measured after every iteration. tolerance: by how much its line may rise over the rest of the run."""

    unit: str
    tolerance: float
    is_share: bool = True  # whether the tolerance is one of the mean, or in the unit itself
    grows: bool = False  # along a line: the tolerance is then that of the points around it
    mean: bool = False  # of a block, instead of the highest


QUANTITIES = {
    "memory": Quantity("MB", 0.02),
    "descriptors": Quantity("open files", 0.5, is_share=False),
    "threads": Quantity("threads", 0.5, is_share=False),
    "seconds": Quantity("s an iteration", 0.2, mean=True),
    "processor_seconds": Quantity("s an iteration", 0.1, mean=True),
    "folder": Quantity("MB", 0.05, grows=True),
}


class Meter(Callback):
    """Fills a row after every iteration; all of it is allocated before, so that it is no part of what grows."""

    def __init__(self, iterations: int) -> None:
        self.rows = np.full((iterations, len(QUANTITIES)), np.nan)
        self._process = psutil.Process()
        self._clocks = time.perf_counter(), time.process_time()

    def on_iteration(self, trainer: Run, metrics: dict) -> None:
        before, self._clocks = self._clocks, (time.perf_counter(), time.process_time())
        seconds, processor = (now - then for now, then in zip(self._clocks, before, strict=True))
        process, megabytes = self._process, size(trainer.config.output) / 1e6
        self.rows[metrics["iteration"] - 1] = (
            process.memory_info().rss / 1e6, process.num_fds(), process.num_threads(), seconds, processor, megabytes,
        )  # fmt: skip


def size(folder: Path) -> int:
    """Bytes of all files in it. A file may go while it is looked at: a checkpoint that is being renamed or removed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


def thinned(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of each quantity one value a block of iterations, from (iterations, quantities)."""
    blocks = rows.reshape(-1, BLOCK, len(QUANTITIES))
    return {
        name: (blocks[..., i].mean(1) if quantity.mean else blocks[..., i].max(1))
        for i, (name, quantity) in enumerate(QUANTITIES.items())
    }


def verdict(quantity: Quantity, values: np.ndarray) -> dict[str, Any]:
    """The line through a block's values (blocks,) after the first quarter, and whether they are as they have to be."""
    first = int(WARM * len(values))
    x, y = np.arange(first, len(values)) * BLOCK, values[first:]
    slope, level = np.polyfit(x, y, 1)
    rise = slope * (x[-1] - x[0])
    if quantity.grows:
        off = np.abs(y - (slope * x + level)).max()
        good, said = slope > 0 and off <= quantity.tolerance * rise, "linear"
    else:
        good, said = rise <= quantity.tolerance * (y.mean() if quantity.is_share else 1), "flat"
    slope_per_1000 = round(float(1000 * slope), 9)  # without the rounding errors of a line through equal values
    return {"mean": float(y.mean()), "slope_per_1000": slope_per_1000, "verdict": said if good else f"not {said}"}


def picture(values: dict[str, np.ndarray], verdicts: dict[str, dict]) -> Any:
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for ax, (name, quantity) in zip(axes.flat, QUANTITIES.items(), strict=True):
        ax.plot(np.arange(1, len(values[name]) + 1) * BLOCK, values[name], linewidth=1)
        found = verdicts[name]
        ax.set_title(f"{name.replace('_', ' ')}: {found['verdict']}, {found['slope_per_1000']:+.3g} in 1,000", fontsize=10)
        ax.set_ylabel(quantity.unit)
        ax.set_xlabel("iteration")
        ax.set_ylim(bottom=0, top=1.3 * values[name].max())
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000, help=f"a multiple of {4 * BLOCK}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    meter = Meter(arguments.iterations)
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"iterations={arguments.iterations}", f"output={folder}", *arguments.set]
        trainer = Trainer(load_config(ROOT / "configs" / "tiny_shapes_grpo.yaml", settings), callbacks=[meter])
        trainer.run()
        trainer.close()
    values = thinned(meter.rows)
    verdicts = {name: verdict(quantity, values[name]) for name, quantity in QUANTITIES.items()}
    for name, found in verdicts.items():
        print(f"{name:18} {found['verdict']:11} {found['mean']:10.4g} {found['slope_per_1000']:+10.3g} in 1,000 iterations")
    result = {
        "iterations": arguments.iterations, "quantities": verdicts,
        "blocks": {name: [float(f"{value:.6g}") for value in column] for name, column in values.items()},
    }  # fmt: skip
    finish("soak", result, picture(values, verdicts))
    leave()
    return int(any(found["verdict"].startswith("not") for found in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
