"""What a slow reward costs an iteration: its batches are scored beside the next batches' rollouts.

    python benchmarks/reward_overlap.py           the tiny model; writes results/reward_overlap_DEVICE.{json,png}

The reward sleeps as long as the rollout of a batch takes, as one on another machine would. With n batches an iteration

    one after the other      n (rollout + reward) + update
    overlapped               n rollout + reward + update          only the last batch's reward is waited for

Both forms run in this process, in turn, iteration after iteration; a third has a reward that takes no time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, pyplot
from tqdm import tqdm

from fastgrpo.engine.ranks import finish as leave
from fastgrpo.engine.ranks import start
from fastgrpo.trainer import Trainer
from fastgrpo.validation import load_config

FORMS = ("no reward time", "overlapped", "one after the other")
COLORS = {"rollout": "#2f6fdb", "decode": "#8ab4f8", "reward": "#e8a33d", "update": "#9aa5b1", "other": "#d6dbe0"}


class Slow:
    """A reward that any machine can compute, after `seconds` of doing nothing."""

    seconds = 0.0

    def __call__(self, images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        time.sleep(self.seconds)
        return images.float().mean(dim=(1, 2, 3)).cpu() / 255


class AtOnce:
    """A pool whose every call is done before the next line."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def measure(trainer: Trainer, slow: Slow, batches: int, rounds: int) -> tuple[float, dict[str, list[dict[str, float]]]]:
    """Seconds of a batch's rollout, and of each form the phases of every iteration but the first, which warms up."""
    trainer.reward.rewards.update(dict.fromkeys(trainer.reward.names, slow))
    warm = trainer.iterate(1)["seconds"]
    warm = trainer.iterate(2)["seconds"]
    pause, beside = (warm["rollout"] + warm["decode"]) / batches, trainer.scorer.pool
    found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
    iteration = 2
    for _ in tqdm(range(rounds), desc="rounds"):
        for form in FORMS:
            iteration += 1
            slow.seconds = 0.0 if form == FORMS[0] else pause
            trainer.scorer.pool = AtOnce() if form == FORMS[2] else beside
            began = time.perf_counter()
            phases = trainer.iterate(iteration)["seconds"]
            # What was waited for between the phases, as the scores of a form that scores at once, is the reward's too.
            rest = time.perf_counter() - began - sum(phases.values())
            found[form].append({**phases, "reward": phases["reward"] + rest})
    return pause, found


def draw(rows: list[dict[str, Any]]) -> Any:
    plt = pyplot()

    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    for n, row in enumerate(rows):
        left = 0.0
        for phase, color in COLORS.items():
            value = row["phases"].get(phase, 0.0)
            axes.barh(n, value, left=left, color=color, label=None if n else phase)
            left += value
        axes.text(left, n, f"  {row['seconds']:.2f} s")
    axes.set_yticks(range(len(rows)), [row["form"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="seconds an iteration", title="A reward that takes as long as a rollout")
    axes.legend(frameon=False, ncols=len(COLORS), loc="upper center", bbox_to_anchor=(0.5, -0.28))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "benchmarks" / "ten_steps.yaml")
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each form")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for all forms")
    arguments = parser.parse_args()
    ranks = start()
    with tempfile.TemporaryDirectory() as folder:
        smaller = ["rollout.batch_size=32", *arguments.set, f"output={folder}"]
        config = load_config(arguments.config, smaller)
        batches = config.rollout.groups * config.rollout.group_size // config.rollout.batch_size
        trainer = Trainer(config, ranks=ranks)
        pause, found = measure(trainer, Slow(), batches, arguments.rounds)
        trainer.close()
    rows = []
    for form, iterations in found.items():
        phases = {phase: statistics.median(one[phase] for one in iterations) for phase in iterations[0]}
        rows.append({
            "form": form, "seconds": round(statistics.median(sum(one.values()) for one in iterations), 4),
            "phases": {phase: round(value, 4) for phase, value in phases.items()},
        })  # fmt: skip
    free, overlapped, serial = (row["seconds"] for row in rows)
    hidden = 1 - (overlapped - free) / (batches * pause)
    result = {"batches": batches, "reward_seconds_a_batch": round(pause, 4), "rounds": arguments.rounds, "rows": rows}
    result |= {"speedup_over_one_after_the_other": round(serial / overlapped, 3), "share_of_reward_hidden": round(hidden, 3)}
    finish("reward_overlap", result, draw(rows))
    del trainer
    leave()


if __name__ == "__main__":
    main()
